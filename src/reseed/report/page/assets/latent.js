// Page of one latent: its statistics, and its contexts beside those of its partners in other runs.
"use strict";

const latent = (() => {
  const ADDRESS = /^#latent\/(.+)\/(\d+)$/;
  const runs = () => reseed.runs;

  /** Return a latent's address. A run in two cells has two entries; the second has its index added. */
  function address(r, i) {
    const first = runs().findIndex((run) => run.id === runs()[r].id);
    return `#latent/${encodeURI(runs()[r].id)}${first === r ? "" : `~${r}`}/${i}`;
  }

  function place(name) {
    const [, id, number] = name.match(/^(.*?)(?:~(\d+))?$/);
    return number ? Number(number) : runs().findIndex((run) => run.id === id);
  }

  async function show(main, name, number) {
    const r = place(decodeURIComponent(name));
    const i = Number(number);
    if (!(r >= 0) || !(i >= 0 && i < runs()[r].latents)) {
      const told = `This report has no latent ${number} of run ${name}. Choose one from the list (Esc).`;
      main.replaceChildren(element("p", { class: "trouble", role: "alert" }, told));
      return;
    }
    const run = runs()[r];
    const c = await reseed.load(`run/${r}`, `latents/${r}.js`);
    const own = await contextsOf(r, i);
    const partners = await Promise.all(run.others.map((other, k) => partnerOf(c, i, other, k)));
    const text = run.vocabulary === undefined ? {} : await reseed.load(`tokens/${run.vocabulary}`, `latents/tokens-${run.vocabulary}.js`);
    main.replaceChildren(head(r, i), stats(run, c, i, own), facts(r, own, text), columns(r, i, own, partners));
    document.title = `latent ${i}, ${run.name}`;
    scrollTo(0, 0);
  }

  async function contextsOf(r, i) {
    if (runs()[r].vocabulary === undefined || i < 0) return null;
    const shard = Math.floor(i / reseed.shard);
    const found = await reseed.load(`contexts/${r}/${shard}`, `latents/${r}/${shard}.js`);
    return found[i - shard * reseed.shard];
  }

  /** Return the partner in another run: the decoder's match, because `shared` requires both to agree. */
  async function partnerOf(c, i, other, k) {
    const match = c.partner_decoder[k][i];
    const vocabulary = runs()[other].vocabulary;
    if (vocabulary !== undefined) await reseed.load(`tokens/${vocabulary}`, `latents/tokens-${vocabulary}.js`);
    return {
      other, match,
      decoder: c.cosine_decoder[k][i],
      encoder: c.cosine_encoder[k][i],
      byEncoder: c.partner_encoder[k][i],
      shared: Boolean(c.shared[k][i]),
      pearson: c.pearson?.[k][i],
      jaccard: c.jaccard?.[k][i],
      contexts: match >= 0 ? await contextsOf(other, match) : null,
    };
  }

  function head(r, i) {
    const turn = (steps, name, key) => element("button", {
      type: "button", disabled: !beside(r, i, steps), title: `${name} (${key})`, onclick: () => step(steps),
    }, name);
    return element("div", { class: "latent-head" },
      element("h2", {}, `Latent ${i}`), element("span", { class: "state" }, runs()[r].name),
      element("div", { class: "steps" },
        element("button", { type: "button", title: "to the list (Esc)", onclick: () => browser.back() }, "Back to the list"),
        turn(-1, "previous", "k"), turn(1, "next", "j")));
  }

  /** Return the latent `steps` further in the list, or in the run if the list does not show this one. */
  function beside(r, i, steps) {
    const found = list.beside(r, i, steps);
    if (found !== undefined) return found;
    return i + steps >= 0 && i + steps < runs()[r].latents ? { r, i: i + steps } : null;
  }

  /** Move on from the latent in the address, which may be ahead of the page that is shown. */
  function step(steps) {
    const [, name, number] = location.hash.match(ADDRESS);
    const next = beside(place(decodeURIComponent(name)), Number(number), steps);
    if (next) location.hash = address(next.r, next.i);
  }

  function stats(run, c, i, own) {
    const state = c.live[i] ? "live" : "not live";
    const about = (name, value, more = "") => element("div", {}, element("dt", {}, name),
      element("dd", {}, value, more ? element("small", {}, ` ${more}`) : null));
    const known = c.reproducibility[i] !== null;
    const bounds = known ? `[${words.number(c.reproducibility_low[i])}, ${words.number(c.reproducibility_high[i])}]` : "";
    const absorption = c.absorption_words ? list.absorbed(run, c, i) || "none" : null;
    return element("dl", { class: "stats" },
      about("reproducibility", words.number(c.reproducibility[i]), bounds),
      about("shared with", `${c.shared_with[i]} of ${run.others.length}`, "others"),
      about("density", words.density(c.firing[i] / Math.max(1, run.tokens)), `${words.count(c.firing[i])} of ${words.count(run.tokens)} tokens`),
      about("state", state, c.dead[i] ? "dead at the end of training" : ""),
      own ? about("activation", words.amount(own.max), `largest; mean ${words.amount(own.mean)}`) : null,
      absorption === null ? null : about("absorption", absorption));
  }

  function facts(r, own, text) {
    if (!own) return element("div");
    const tokens = (flat) => pairs(flat).map(([token, logit]) =>
      element("span", { class: "token", title: `logit ${logit}` }, words.visible(text[token] ?? "?")));
    const near = pairs(own.near).map(([i, cosine]) =>
      element("span", { class: "near" }, element("a", { href: address(r, i) }, String(i)), ` ${words.number(cosine)}`));
    const fact = (title, content) => (content.length
      ? element("div", {}, element("h3", {}, title), element("div", { class: "tokens" }, content)) : null);
    return element("div", { class: "facts" },
      fact("Promotes, through the unembedding", tokens(own.up)),
      fact("Suppresses", tokens(own.down)),
      fact("Nearest decoder rows of this run", near));
  }

  function columns(r, i, own, partners) {
    const mine = element("section", { class: "column" }, element("h3", {}, `${runs()[r].name}: ${i}`),
      element("p", { class: "match" }, "this latent"), passages(r, own));
    return element("div", { class: "columns" }, mine, partners.map(column));
  }

  /** Return how alike the activations of a latent and its match are, or why this is not known. */
  function agreement(run, pearson, jaccard) {
    const { tokens, reason } = run.activations;
    const unknown = (pearson ?? null) === null;
    const why = reason ? ` (activations were not compared: ${reason})` : unknown ? " (undefined: the latent or its match is constant on these tokens)" : "";
    const title = `Pearson: correlation of both latents' activations; Jaccard: overlap of the tokens on which they fire; on ${words.count(tokens)} held-out tokens`;
    return element("span", { title }, `Pearson ${words.number(pearson)}, Jaccard ${words.number(jaccard)}${why}`);
  }

  function column({ other, match, decoder, encoder, byEncoder, shared, pearson, jaccard, contexts }) {
    const run = runs()[other];
    if (match < 0) {
      const why = decoder === null ? "rows of these runs have no common space" : "the dictionaries are of different sizes";
      return element("section", { class: "column" }, element("h3", {}, run.name),
        element("p", { class: "match" }, `no match: ${why}`));
    }
    const same = byEncoder === match;
    const byRow = byEncoder < 0 ? "no match by encoder" : `encoder ${words.number(encoder)}`;
    const cosines = [`cosine decoder ${words.number(decoder)}, ${byRow}`,
      same || byEncoder < 0 ? null : [" with ", element("a", { href: address(other, byEncoder) }, String(byEncoder))]];
    const title = [`${run.name}: `, element("a", { href: address(other, match) }, String(match)), shared ? " *" : ""];
    const unlike = shared && (pearson ?? null) !== null && pearson < run.activations.alike;
    const state = shared ? (unlike ? "shared by weights, not alike" : "shared") : "not shared";
    return element("section", { class: "column" }, element("h3", { title: shared ? "shared" : null }, title),
      element("p", { class: "match" }, state, element("br"), cosines, element("br"), agreement(run, pearson, jaccard)), passages(other, contexts));
  }

  function passages(r, own) {
    if (!own) {
      const why = runs()[r].vocabulary === undefined
        ? "No passages yet: evaluate this run with evaluation=contexts." : "No passages of this latent.";
      return element("p", { class: "state" }, why);
    }
    if (!own.c.length) return element("p", { class: "state" }, "This latent fired on no token that was read.");
    const top = own.c.filter(([quantile]) => quantile === null);
    const sampled = own.c.filter(([quantile]) => quantile !== null);
    const part = (title, found) => (found.length ? [element("h4", {}, title), found.map((context) => passage(r, context, own.max))] : null);
    return element("div", {}, part("Where it fires most", top), part("Sampled, highest quantile first", sampled));
  }

  function passage(r, [quantile, peak, position, ids, flat], largest) {
    const text = reseed.value(`tokens/${runs()[r].vocabulary}`);
    const activations = new Map(pairs(flat));
    const tokens = ids.map((id, at) => {
      const shown = broken(text[id] ?? "?");
      const value = activations.get(at);
      if (!value && at !== peak) return element("span", {}, shown);
      const strength = Math.min(1, (value ?? 0) / (largest || 1));
      return element("mark", { class: at === peak ? "peak" : null, style: `--a:${(0.12 + 0.68 * strength).toFixed(2)}`, title: value === undefined ? null : String(value) }, shown);
    });
    const value = words.amount(activations.get(peak));
    const where = quantile === null ? value : `${value} · ${Math.round(100 * quantile)}%`;
    return element("div", { class: "context" },
      element("div", { class: "value", title: `${quantile === null ? "activation" : "activation, quantile"}; token ${words.count(position)} of the held-out text` }, where),
      element("div", { class: "passage-text" }, tokens));
  }

  /** Return a text in which each line break is shown as a sign and then applied. */
  function broken(text) {
    return text.split(/(\r?\n)/).flatMap((part, at) => (at % 2 ? [element("span", { class: "break" }, "↵"), "\n"] : part.replace(/\t/g, "→")));
  }

  function pairs(flat) {
    return Array.from({ length: flat.length / 2 }, (_, k) => [flat[2 * k], flat[2 * k + 1]]);
  }

  return { show, address, step, ADDRESS };
})();
