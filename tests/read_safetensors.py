"""Prints what Python's safetensors finds in a file: name → [type, shape, SHA-256 of the values]."""

import hashlib
import json
import sys

from safetensors import safe_open

with safe_open(sys.argv[1], framework="numpy") as file:
    found = {}
    for name in file.keys():
        tensor = file.get_tensor(name)
        found[name] = [str(tensor.dtype), list(tensor.shape), hashlib.sha256(tensor.tobytes()).hexdigest()]
print(json.dumps(found))
