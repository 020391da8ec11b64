"""Reads TensorBoard event files with TensorBoard's own reader and prints what they hold as JSON.

usage: read_events.py FOLDER
"""

import json
import math
import sys

from tensorboard.backend.event_processing import event_accumulator

events = event_accumulator.EventAccumulator(sys.argv[1], size_guidance={"scalars": 0, "images": 0})
events.Reload()
tags = events.Tags()
found = {"scalars": {}, "images": {}}
for tag in tags["scalars"]:
    # JSON has no NaN
    found["scalars"][tag] = [
        [event.step, event.value if math.isfinite(event.value) else None] for event in events.Scalars(tag)
    ]
for tag in tags["images"]:
    found["images"][tag] = [
        [event.step, event.width, event.height, event.encoded_image_string.hex()] for event in events.Images(tag)
    ]
json.dump(found, sys.stdout, allow_nan=False)
