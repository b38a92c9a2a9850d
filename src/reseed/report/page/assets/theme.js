// The theme that was chosen, before anything is drawn; else the system's.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("reseed-theme");
  } catch {
    // A browser may forbid pages from a disk to remember anything.
  }
  if (chosen) document.documentElement.dataset.theme = chosen;
}
