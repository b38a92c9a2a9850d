// The list of latents: filters, order, pages.
"use strict";

const list = (() => {
  const PAGE = 50;
  const FEW = 60000; // with more latents in total, the list opens with the first run only

  const runs = () => reseed.runs;
  const density = (c, i, r) => c.firing[i] / Math.max(1, runs()[r].tokens);

  // Filters; the first option of each selects all latents.
  const FILTERS = {
    kind: ["Show", {
      all: ["all latents", () => true],
      shared: ["shared with every other", (c, i, r) => c.shared_with[i] === runs()[r].others.length],
      some: ["shared with some", (c, i) => c.shared_with[i] > 0],
      orphan: ["orphan: live, shared with none", (c, i) => c.live[i] && c.shared_with[i] === 0],
      silent: ["not live", (c, i) => !c.live[i]],
      dead: ["dead at the end of training", (c, i) => c.dead[i]],
      letter: ["stands for a letter", (c, i) => c.absorption_class?.[i] >= 0],
      absorbs: ["absorbs words", (c, i) => c.absorption_words?.[i] > 0],
      spared: ["absorbs nothing", (c, i) => c.absorption_words?.[i] === 0],
    }],
    reproducible: ["Reproducible", {
      any: ["any", () => true],
      high: ["0.8 and more", (c, i) => c.reproducibility[i] >= 0.8],
      middle: ["0.2 to 0.8", (c, i) => c.reproducibility[i] >= 0.2 && c.reproducibility[i] < 0.8],
      low: ["below 0.2", (c, i) => c.reproducibility[i] !== null && c.reproducibility[i] < 0.2],
    }],
    density: ["Density", {
      any: ["any", () => true],
      never: ["never fires", (c, i) => c.firing[i] === 0],
      rare: ["below 0.1%", (c, i, r) => c.firing[i] > 0 && density(c, i, r) < 0.001],
      middle: ["0.1% to 10%", (c, i, r) => density(c, i, r) >= 0.001 && density(c, i, r) <= 0.1],
      dense: ["over 10%: dense", (c, i, r) => density(c, i, r) > 0.1],
    }],
  };
  const OF_ABSORPTION = ["letter", "absorbs", "spared"];

  const OF_BEST = "of the match in one other run: the one in which the smaller of both cosines is largest";
  const COLUMNS = [
    { key: "latent", head: "latent", width: "5.5rem", of: (c, i) => i },
    { key: "run", head: "run", width: "11rem", of: (c, i, r) => r, named: true },
    { key: "density", head: "density", width: "5.5rem", of: density, down: true },
    { key: "reproducibility", head: "reproducible", width: "9rem", of: (c, i) => c.reproducibility[i], down: true },
    { key: "shared", head: "shared", width: "5rem", of: (c, i) => c.shared_with[i], down: true },
    { key: "encoder", head: "cos enc", width: "5rem", of: (c, i) => c.best_cosine_encoder[i], down: true, help: `encoder cosine ${OF_BEST}` },
    { key: "decoder", head: "cos dec", width: "5rem", of: (c, i) => c.best_cosine_decoder[i], down: true, help: `decoder cosine ${OF_BEST}` },
    { key: "pearson", head: "Pearson", width: "5rem", of: (c, i) => c.best_pearson?.[i], down: true, help: `correlation of the activations of the latent and its match by decoder, ${OF_BEST}` },
    { key: "absorption", head: "absorption", width: "10rem", of: (c, i) => c.absorption_words?.[i] ?? null, down: true, named: true },
  ];

  let loaded = []; // columns by index of the run
  let order = []; // listed latents: run, latent and sort value
  let at = 0; // row of the page that the keyboard selects

  const first = (options) => Object.keys(options)[0];
  const defaultRun = () => (runs().reduce((sum, run) => sum + run.latents, 0) <= FEW ? "" : runs()[0].id);

  /** Return the state of the list from the address's query, with defaults for what it leaves out. */
  function stateOf(query) {
    const given = new URLSearchParams(query);
    const filters = Object.entries(FILTERS).map(([name, [, options]]) =>
      [name, Object.hasOwn(options, given.get(name)) ? given.get(name) : first(options)]);
    return {
      ...Object.fromEntries(filters),
      run: given.get("run") ?? defaultRun(),
      text: given.get("text") ?? "",
      sort: given.get("sort") ?? "reproducibility",
      down: (given.get("down") ?? "1") === "1",
      page: Math.max(0, Number.parseInt(given.get("page") ?? "1", 10) - 1) || 0,
    };
  }

  function addressOf(state) {
    const said = new URLSearchParams();
    if (state.run !== defaultRun()) said.set("run", state.run);
    if (state.text) said.set("text", state.text);
    for (const [name, [, options]] of Object.entries(FILTERS)) {
      if (state[name] !== first(options)) said.set(name, state[name]);
    }
    if (state.sort !== "reproducibility") said.set("sort", state.sort);
    if (!state.down) said.set("down", "0");
    if (state.page) said.set("page", state.page + 1);
    return `#list?${said}`;
  }

  async function load(state) {
    const wanted = runs().map((_, r) => r).filter((r) => !state.run || runs()[r].id === state.run);
    await Promise.all(wanted.map(async (r) => (loaded[r] = await reseed.load(`run/${r}`, `latents/${r}.js`))));
    return wanted;
  }

  /** Return the latents that pass the filters, sorted. */
  function chosen(state, wanted) {
    const rules = Object.entries(FILTERS).map(([name, [, options]]) => options[state[name]][1]);
    const text = state.text.toLowerCase();
    const column = COLUMNS.find((c) => c.key === state.sort) ?? COLUMNS[3];
    const found = [];
    for (const r of wanted) {
      const c = loaded[r];
      for (let i = 0; i < runs()[r].latents; i++) {
        if (rules.every((holds) => holds(c, i, r)) && (!text || matches(c, i, text))) {
          const value = column.of(c, i, r);
          found.push({ r, i, value: value ?? Number.NaN });
        }
      }
    }
    const sign = state.down ? -1 : 1;
    // Unknown values come last in either direction.
    return found.sort((a, b) =>
      Number.isNaN(a.value) - Number.isNaN(b.value) || sign * (a.value - b.value || 0) || a.r - b.r || a.i - b.i);
  }

  /** Return whether a latent matches the search: a number by its index, other text by its passage. */
  function matches(c, i, text) {
    if (/^\d+$/.test(text) && i === Number(text)) return true;
    return c.peak ? (c.before[i] + c.peak[i] + c.after[i]).toLowerCase().includes(text) : false;
  }

  async function show(main, query) {
    const state = stateOf(query);
    const wanted = await load(state);
    order = chosen(state, wanted);
    const pages = Math.max(1, Math.ceil(order.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    at = 0;
    const filters = main.querySelector(".filters") ?? made(main);
    fill(filters, state);
    main.querySelector(".wide").replaceChildren(table(state, wanted));
    main.querySelector(".pager").replaceChildren(...pager(state, pages));
    document.title = reseed.title;
  }

  /** Make the parts that stay while the list is filtered, so that the search field keeps its caret. */
  function made(main) {
    const select = (name, title) => element("label", {}, `${title} `,
      element("select", { id: name, onchange: (e) => go({ [name]: e.target.value, page: 0 }) }));
    const filters = element("div", { class: "filters", role: "search" },
      select("run", "Run"), Object.entries(FILTERS).map(([name, [title]]) => select(name, title)),
      element("input", {
        type: "search", id: "text", placeholder: "token or number", "aria-label": "Search tokens or the number of a latent",
        oninput: (e) => go({ text: e.target.value, page: 0 }, true),
      }),
      element("span", { class: "count", "aria-live": "polite" }));
    main.replaceChildren(filters,
      element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Latents" }),
      element("div", { class: "pager" }));
    return filters;
  }

  function fill(filters, state) {
    const many = runs().length > 1 ? [element("option", { value: "" }, `all ${runs().length} runs`)] : [];
    const named = runs().map((run) => element("option", { value: run.id }, run.name));
    filters.querySelector("#run").replaceChildren(...many, ...named);
    filters.querySelector("#run").value = state.run;
    const absorption = loaded.some((c) => c?.absorption_words);
    for (const [name, [, options]] of Object.entries(FILTERS)) {
      const offered = Object.entries(options).filter(([key]) => absorption || !OF_ABSORPTION.includes(key));
      const select = filters.querySelector(`#${name}`);
      select.replaceChildren(...offered.map(([key, [text]]) => element("option", { value: key }, text)));
      select.value = state[name];
    }
    const search = filters.querySelector("#text");
    if (document.activeElement !== search) search.value = state.text;
    const what = order.length === 1 ? "latent" : "latents";
    filters.querySelector(".count").textContent = `${words.count(order.length)} ${what}`;
  }

  function table(state, wanted) {
    const passages = wanted.some((r) => loaded[r].peak);
    const absorption = wanted.some((r) => loaded[r].absorption_words);
    const shown = COLUMNS.filter((c) => (c.key !== "absorption" || absorption) && (c.key !== "run" || wanted.length > 1));
    const heads = shown.map((column) => {
      const sorted = state.sort === column.key ? (state.down ? "descending" : "ascending") : null;
      const turn = () => go({ sort: column.key, down: sorted ? !state.down : Boolean(column.down), page: 0 });
      return element("th", { scope: "col", class: column.named ? "name" : null, "aria-sort": sorted },
        element("button", { type: "button", title: column.help, onclick: turn }, column.head));
    });
    if (passages) heads.push(element("th", { scope: "col", class: "name" }, "fires most on"));
    const widths = shown.map((column) => element("col", { style: `width:${column.width}` }));
    const rows = order.slice(state.page * PAGE, (state.page + 1) * PAGE).map((row, place) => line(row, place, shown, passages));
    return element("table", { class: "list" },
      element("colgroup", {}, widths, passages ? element("col") : null),
      element("thead", {}, element("tr", {}, heads)), element("tbody", {}, rows));
  }

  function line({ r, i }, place, shown, passages) {
    const c = loaded[r];
    const run = runs()[r];
    const cells = {
      latent: () => element("a", { href: latent.address(r, i) }, String(i)),
      run: () => run.name,
      density: () => words.density(density(c, i, r)),
      reproducibility: () => [bar(c.reproducibility[i]), words.number(c.reproducibility[i])],
      shared: () => (c.dead[i] && !c.live[i] ? element("span", { class: "state" }, "dead") : `${c.shared_with[i]} of ${run.others.length}`),
      encoder: () => words.number(c.best_cosine_encoder[i]),
      decoder: () => words.number(c.best_cosine_decoder[i]),
      pearson: () => words.number(c.best_pearson?.[i]),
      absorption: () => absorbed(run, c, i),
    };
    const made = shown.map((column) => element("td", { class: column.named ? "name" : null }, cells[column.key]()));
    if (passages) made.push(element("td", { class: "passage" }, c.peak ? passage(c, i) : null));
    return element("tr", { class: place === at ? "at" : null, onclick: (e) => opened(e, r, i) }, made);
  }

  /** Open the latent of a clicked row, unless the click was on its link or selected text. */
  function opened(event, r, i) {
    if (!event.target.closest("a") && !String(getSelection())) location.hash = latent.address(r, i);
  }

  function bar(value) {
    return element("span", { class: "bar", "aria-hidden": "true" }, element("i", { style: `width:${100 * (value ?? 0)}%` }));
  }

  function absorbed(run, c, i) {
    const told = [];
    if (c.absorption_class?.[i] >= 0) told.push(`for ${run.classes[c.absorption_class[i]]}`);
    if (c.absorption_words?.[i] > 0) told.push(`absorbs ${c.absorption_words[i]}`);
    return told.join(", ");
  }

  function passage(c, i) {
    return element("div", {},
      element("span", { class: "before" }, words.visible(c.before[i])),
      element("span", { class: "rest" }, element("mark", {}, words.visible(c.peak[i])), words.visible(c.after[i])));
  }

  function pager(state, pages) {
    const to = (page, text, label) => element("button", {
      type: "button", "aria-label": label, disabled: page < 0 || page >= pages || page === state.page, onclick: () => go({ page }),
    }, text);
    return [to(0, "«", "First page"), to(state.page - 1, "‹ previous", "Previous page"),
      element("span", {}, `page ${state.page + 1} of ${words.count(pages)}`),
      to(state.page + 1, "next ›", "Next page"), to(pages - 1, "»", "Last page"),
      element("button", { type: "button", id: "help", onclick: () => browser.help() }, "Keys")];
  }

  /** Change the state; `silent` (while the user types) adds no step to the browser's history. */
  function go(changes, silent = false) {
    const address = addressOf({ ...stateOf(browser.query()), ...changes });
    if (silent) {
      history.replaceState(null, "", address);
      browser.show();
    } else location.hash = address;
  }

  /** Move the keyboard's selection by `steps` rows; over an end to the next or previous page. */
  function move(steps) {
    const rows = document.querySelectorAll(".list tbody tr");
    const state = stateOf(browser.query());
    const next = at + steps;
    if (next >= rows.length && (state.page + 1) * PAGE < order.length) return go({ page: state.page + 1 });
    if (next < 0 && state.page > 0) return go({ page: state.page - 1 });
    rows[at]?.classList.remove("at");
    at = Math.max(0, Math.min(rows.length - 1, next));
    rows[at]?.classList.add("at");
    rows[at]?.scrollIntoView({ block: "nearest" });
  }

  function open() {
    const row = order[stateOf(browser.query()).page * PAGE + at];
    if (row) location.hash = latent.address(row.r, row.i);
  }

  /** Return the latent `steps` from another in the list; null beyond its ends, undefined if the
   * other is not listed. */
  function beside(r, i, steps) {
    const place = order.findIndex((row) => row.r === r && row.i === i);
    return place < 0 ? undefined : order[place + steps] ?? null;
  }

  function turn(steps) {
    const state = stateOf(browser.query());
    const pages = Math.ceil(order.length / PAGE);
    if (state.page + steps >= 0 && state.page + steps < pages) go({ page: state.page + steps });
  }

  return { show, move, open, turn, beside, absorbed };
})();
