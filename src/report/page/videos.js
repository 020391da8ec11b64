const videos = [...document.querySelectorAll('video')], button = document.getElementById('playing');
const all = play => {
  videos.forEach(video => play ? video.play() : video.pause());
  button.textContent = play ? 'Pause all videos' : 'Play all videos';
};
if (button) {
  button.hidden = false;
  button.onclick = () => all(videos.every(video => video.paused));
  for (const video of videos) video.onclick = () => video.paused ? video.play() : video.pause();
  if (matchMedia('(prefers-reduced-motion: reduce)').matches) all(false);
}
