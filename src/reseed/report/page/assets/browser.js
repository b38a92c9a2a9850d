// The latent browser: shows the list or the latent in the address, and handles keys.
"use strict";

const browser = (() => {
  const main = document.getElementById("main");
  let last = "#list?"; // the list as it was left
  let turn = 0; // number of the latest request; a page that arrives for an older one is dropped

  function query() {
    return (location.hash.startsWith("#latent/") ? last : location.hash).split("?")[1] ?? "";
  }

  async function show() {
    const mine = ++turn;
    const [, name, number] = location.hash.match(latent.ADDRESS) ?? [];
    try {
      if (name !== undefined) {
        const frame = element("div");
        await latent.show(frame, name, number);
        if (mine === turn) main.replaceChildren(...frame.childNodes);
      } else {
        last = location.hash || "#list?";
        await list.show(main, query());
      }
    } catch (error) {
      main.replaceChildren(element("p", { class: "trouble", role: "alert" }, String(error.message ?? error)));
      throw error;
    }
    main.dataset.ready = location.hash;
  }

  const back = () => (location.hash = last);

  function help() {
    let dialog = document.querySelector("dialog");
    if (!dialog) {
      const keys = [["j, ↓", "next"], ["k, ↑", "previous"], ["Enter", "open"], ["Esc", "back to the list"],
        ["n, p", "next, previous page"], ["/", "search"], ["t", "light or dark"], ["?", "these keys"]];
      const said = keys.map(([key, text]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, text)]);
      dialog = element("dialog", { "aria-label": "Keys" }, element("h2", {}, "Keys"), element("dl", {}, said),
        element("form", { method: "dialog" }, element("button", {}, "Close")));
      document.body.append(dialog);
    }
    dialog.showModal();
  }

  function pressed(event) {
    if (document.querySelector("dialog[open]")) return;
    const search = document.getElementById("text");
    if (event.key === "Escape") {
      if (document.activeElement === search) search.blur();
      else if (location.hash.startsWith("#latent/")) back();
      return;
    }
    if (reseed.typing(event)) return;
    const onControl = event.target.closest("a, button, summary");
    const inLatent = location.hash.startsWith("#latent/");
    const does = {
      j: () => (inLatent ? latent.step(1) : list.move(1)),
      k: () => (inLatent ? latent.step(-1) : list.move(-1)),
      n: () => inLatent || list.turn(1),
      p: () => inLatent || list.turn(-1),
      "/": () => search?.focus(),
      "?": help,
    };
    // In a latent the arrows scroll.
    if (!inLatent) Object.assign(does, { ArrowDown: does.j, ArrowUp: does.k });
    if (!inLatent && !onControl) does.Enter = list.open;
    if (does[event.key]) {
      event.preventDefault();
      does[event.key]();
    }
  }

  addEventListener("hashchange", show);
  document.addEventListener("keydown", pressed);
  return { show, query, back, help };
})();

{
  const found = reseed.value("runs");
  reseed.runs = found.runs;
  reseed.shard = found.shard;
  reseed.title = document.title;
  browser.show();
}
