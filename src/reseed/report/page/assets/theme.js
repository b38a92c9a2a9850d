// Applies the stored theme, if any, before the first paint; else the system's holds.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("reseed-theme");
  } catch {
    // A browser may forbid storage to pages opened from disk.
  }
  if (chosen) document.documentElement.dataset.theme = chosen;
}
