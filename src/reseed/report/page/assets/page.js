// Scripts of every page: the theme button, and the registry of data files.
"use strict";

const reseed = (() => {
  const { nonce } = document.currentScript; // the page's policy loads no script without it
  const values = new Map();
  const waiting = new Map();

  /** Register the value of a data file, which calls this. */
  function data(key, value) {
    values.set(key, value);
  }

  /** Return the value of a data file; it is loaded on first use. */
  function load(key, file) {
    if (values.has(key)) return Promise.resolve(values.get(key));
    if (!waiting.has(key)) {
      waiting.set(
        key,
        new Promise((resolve, reject) => {
          const script = document.createElement("script");
          script.src = file;
          script.nonce = nonce;
          script.onload = () => resolve(values.get(key));
          script.onerror = () => reject(new Error(`${file} is missing from the report's folder`));
          document.head.append(script);
        }),
      );
    }
    return waiting.get(key);
  }

  function toggleTheme() {
    const root = document.documentElement;
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme ?? (dark ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("reseed-theme", root.dataset.theme);
    } catch {
      // The browser forbids storage: the theme holds for this page only.
    }
  }

  /** Return whether a key press belongs to a form field or is a shortcut of the browser. */
  function typing(event) {
    return event.target.closest?.("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
  }

  document.getElementById("theme").addEventListener("click", toggleTheme);
  document.addEventListener("keydown", (event) => {
    if (event.key === "t" && !typing(event)) toggleTheme();
  });
  return { data, load, typing, value: (key) => values.get(key) };
})();
