// Elements and formats. Text is always inserted as text, so that no token is parsed as markup.
"use strict";

/** Return an element; `on…` attributes are listeners, null and false are left out. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") made.style.cssText = value;
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

const words = {
  /** Format a fraction or a cosine. */
  number(value) {
    if (value === null || value === undefined) return "–";
    if (value === 0) return "0";
    return Math.abs(value) >= 0.00995 ? value.toFixed(2) : value.toPrecision(1);
  },
  /** Format an activation. */
  amount(value) {
    return value === undefined ? "–" : String(Number(value.toPrecision(3)));
  },
  /** Format a fraction of the tokens. */
  density(value) {
    if (value === 0) return "never";
    return value < 0.0001 ? value.toExponential(1) : `${(100 * value).toPrecision(2)}%`;
  },
  /** Format a count. */
  count(value) {
    return value.toLocaleString("en");
  },
  /** Replace line breaks and tabs of a token by signs, so that they are visible. */
  visible(text) {
    return text.replace(/\r?\n/g, "↵").replace(/\t/g, "→");
  },
};
