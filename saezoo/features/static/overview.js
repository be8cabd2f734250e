// The list of SAEs, and the overview of one: what it rests on, how often its features fire, and the list of them.
"use strict";

const PAGE = 50;
const SHOWN_METRICS = 10;

function homeView() {
  const { saes } = saezoo.manifest;
  document.title = `Features of ${saes[0]?.collection ?? "nothing"}`;
  const rows = saes.map((sae) => [
    sae.written ? element("a", { href: addressOf.overview(sae.layer) }, sae.layer) : `${sae.layer} (not written yet)`,
    sae.hook, format.count(sae.features.reduce((sum, [start, stop]) => sum + stop - start, 0)), format.count(sae.d_sae),
    format.count(sae.tokens), format.interval(sae.metrics.l0, 3),
  ]);
  return element("div.home", {},
    element("h1", { tabindex: -1 }, [...new Set(saes.map((sae) => sae.collection))].join(", ")),
    element("p", {}, `SAEs of ${[...new Set(saes.map((sae) => sae.model))].join(", ")}; choose one to see its features.`),
    element("div.wide", { tabindex: 0, role: "region", "aria-label": "SAEs" },
      table("SAEs", ["SAE", "hook", "features here", "features in all", "tokens", "L0"], rows, { numbers: [2, 3, 4, 5] })));
}

function crumbs(...parts) {
  document.getElementById("trail").replaceChildren(element("ol", {}, parts.map(([text, href]) =>
    element("li", {}, href ? element("a", { href }, text) : element("span", { "aria-current": "page" }, text)))));
}

function restsOn(sae) {
  return facts([
    ["collection", sae.collection], ["SAE", sae.layer], ["hook", sae.hook], ["model", sae.model],
    ["size", `${format.count(sae.d_in)} × ${format.count(sae.d_sae)}`],
    ["text", sae.text],
    ["tokens", `${format.count(sae.tokens)} scored, in ${format.plural(sae.rows, "row")} of ${format.count(sae.context)}`],
    ["documents", format.count(sae.documents)], ["seed", String(sae.seed)],
    ["versions", Object.entries(sae.versions).map(([name, version]) => `${name} ${version}`).join(", ")],
  ]);
}

function metricsTable(sae) {
  const names = [...new Set([...Object.keys(sae.metrics), ...Object.keys(sae.published)])];
  const row = (name) => [name, format.interval(sae.metrics[name], 4), format.number(sae.published[name], 4)];
  const part = (some, caption) => element("div.wide", { tabindex: 0, role: "region", "aria-label": caption },
    table(caption, ["metric", "here [95 % interval]", "published"], some.map(row), { numbers: [1, 2] }));
  if (!names.length) return element("p.quiet", {}, "None.");
  const rest = names.slice(SHOWN_METRICS);
  return [part(names.slice(0, SHOWN_METRICS), "Metrics"), rest.length > 0 && element("details", {},
    element("summary", {}, `${rest.length} more`), part(rest, "More metrics"))];
}

const HEADS = [
  ["index", "feature", "index in the SAE"],
  ["token", "top tokens", "the tokens with the largest shares of its summed activation; sorts by the first"],
  ["density", "density", "share of tokens on which it fires"],
  ["mean", "mean", "mean activation where it fires"],
  ["max", "max", "largest activation"],
  ["skew", "logit skew", "skewness of what it adds to the logits"],
  ["kurtosis", "kurtosis", "excess kurtosis of what it adds to the logits"],
  ["divergence", "divergence", "how far the top contexts differ from ordinary ones; sorts by the lower end of the 95 % interval"],
  ["logit", "promotes", "the tokens whose logits it raises most; sorts by the first"],
];
const FALLING = new Set(["density", "mean", "max", "skew", "kurtosis", "divergence"]); // the large ones first
const WORDS = new Set(["token", "logit"]);

// Built once for an SAE; `update` then changes what depends on the address, so that the focus stays where it is.
function overviewView(sae, columns) {
  let state;
  const go = (change) => {
    location.hash = addressOf.overview(sae.layer, { ...state, page: 1, ...change });
  };
  const select = element("select", { "aria-label": "what to search", onchange: () => typed() },
    Object.entries(SEARCHES).map(([value, text]) => element("option", { value }, text)));
  const input = element("input", {
    type: "search", id: "search", "aria-label": "search features", autocomplete: "off", spellcheck: "false",
    oninput: () => typed(),
    onkeydown: (event) => {
      if (event.key === "Enter") body.querySelector("a")?.focus();
    },
  });
  // While one types, the address changes without a new step for the back button at each letter.
  function typed() {
    const next = { ...state, by: select.value, q: input.value, page: 1 };
    history.replaceState(null, "", addressOf.overview(sae.layer, next));
    update(next);
  }

  const chart = densityHistogram(columns, sae.tokens, { choose: (bin) => go({ bin }), chosen: () => state.bin });
  const filter = element("p.filter", {});
  const status = element("p.status", { role: "status" });
  const body = element("tbody", {});
  const heads = HEADS.map(([key, text, title]) => element(WORDS.has(key) || key === "index" ? "th" : "th.number",
    { scope: "col" }, element("button", { type: "button", title, onclick: () => sortBy(key) }, text)));
  const pagers = [element("nav.pager", { "aria-label": "Pages above" }), element("nav.pager", { "aria-label": "Pages below" })];

  function sortBy(key) {
    const [usual, other] = FALLING.has(key) ? [`-${key}`, key] : [key, `-${key}`];
    go({ sort: state.sort === usual ? other : usual });
  }

  function update(next) {
    state = next;
    const places = orderOf(columns, sae, state);
    const pages = Math.max(1, Math.ceil(places.length / PAGE));
    state.page = Math.min(state.page, pages);
    if (input.value !== state.q) input.value = state.q;
    select.value = state.by;
    const shown = places.slice((state.page - 1) * PAGE, state.page * PAGE);
    body.replaceChildren(...shown.map((place) => featureRow(sae, columns, place, state)));
    status.textContent = `${format.plural(places.length, "feature")}${places.length < columns.index.length
      ? ` of ${format.count(columns.index.length)}` : ""}${pages > 1 ? `, page ${state.page} of ${format.count(pages)}` : ""}`;
    filter.replaceChildren(...(state.bin == null ? [] : [`Only ${binName(state.bin)}. `,
      element("a", { href: addressOf.overview(sae.layer, { ...state, bin: null, page: 1 }) }, "Show all")]));
    HEADS.forEach(([key], i) => {
      const way = state.sort === key ? "ascending" : state.sort === `-${key}` ? "descending" : null;
      if (way) heads[i].setAttribute("aria-sort", way);
      else heads[i].removeAttribute("aria-sort");
    });
    pressBar(chart, state.bin);
    for (const pager of pagers) fillPager(pager, sae, state, pages);
  }

  const dead = columns.fires.filter((fires) => fires === 0).length;
  const view = element("div.overview", {},
    element("h1", { tabindex: -1 }, `${sae.collection} ${sae.layer}`),
    element("p", {}, `${sae.hook} of ${sae.model}, on ${format.count(sae.tokens)} tokens of ${sae.text}`),
    section("How often features fire",
      chart,
      element("p.quiet", {}, dead === 0 ? `Every feature here fired on these ${format.count(sae.tokens)} tokens. `
        : `${format.count(dead)} of ${format.plural(columns.index.length, "feature")} did not fire on `
        + `${format.count(sae.tokens)} tokens: density below ${format.power(format.densityBound(sae.tokens))} each, with 95 % confidence. `,
        "Shaded: those that fire on more than one token in a hundred, and in ten. "
        + "A bar lists its features.")),
    section("Features",
      element("div.search", { role: "search" }, select, input), filter, status, pagers[0],
      element("div.wide", { tabindex: 0, role: "region", "aria-label": "list of features" },
        element("table.features", {}, element("caption.unseen", {}, "Features; the buttons in the heads sort"),
          element("thead", {}, element("tr", {}, heads)), body)),
      pagers[1]),
    togetherSection("Clusters", "Features of which every two fire largely on the same tokens: Jaccard index 0.3 or more.", sae, columns, columns.clusters),
    togetherSection("Exclusive groups", "Features whose decoder directions are near each other (cosine 0.2 or more), and of which no two fire together nearly as often as chance would have it.", sae, columns, columns.exclusive),
    element("div.pair", {}, section("What this rests on", restsOn(sae)), section("Measured on these tokens", metricsTable(sae))));
  return { view, update };
}

function featureRow(sae, columns, place, state) {
  const index = columns.index[place];
  const chips = (ids) => (ids.length ? ids.map(tokenChip) : UNKNOWN);
  const fires = columns.fires[place];
  return element(fires ? "tr" : "tr.dead", {},
    element("th", { scope: "row" }, element("a", { href: addressOf.feature(sae.layer, index, state) }, String(index))),
    element("td.chips", {}, chips(columns.tokens[place])),
    element("td.number", {}, format.density(fires, sae.tokens)),
    ...["mean", "max", "skew", "kurtosis"].map((name) => element("td.number", {}, format.number(columns[name][place]))),
    element("td.number", {}, format.interval(columns.divergence[place], 2)),
    element("td.chips", {}, chips(columns.promoted[place].slice(0, 5))));
}

function fillPager(pager, sae, state, pages) {
  pager.hidden = pages === 1;
  const link = (text, page, label) => page < 1 || page > pages || page === state.page
    ? element("span", { "aria-hidden": "true" }, text)
    : element("a", { href: addressOf.overview(sae.layer, { ...state, page }), "aria-label": label }, text);
  pager.replaceChildren(link("« first", 1, "first page"), link("‹ previous", state.page - 1, "previous page"),
    element("span", {}, `${format.count(state.page)} / ${format.count(pages)}`),
    link("next ›", state.page + 1, "next page"), link("last »", pages, "last page"));
}

const SHOWN_GROUPS = 20;

function togetherSection(title, meaning, sae, columns, groups) {
  if (groups == null) return null;
  const item = (group) => element("li", {}, group.map((index) =>
    element("span.member", {}, featureLink(sae.layer, index), " ", hint(columns, index, 1))));
  const rest = groups.slice(SHOWN_GROUPS);
  return section(title, element("p.quiet", {}, `${meaning} ${groups.length ? format.count(groups.length) : "None found"}.`),
    groups.length > 0 && element("ul.groups", {}, groups.slice(0, SHOWN_GROUPS).map(item)),
    rest.length > 0 && element("details", {}, element("summary", {}, `${format.count(rest.length)} more`),
      element("ul.groups", {}, rest.map(item))));
}

// What another feature of this SAE is about, in a few tokens.
function hint(columns, index, most = 2) {
  return (columns.tokens[columns.places.get(index)] ?? []).slice(0, most).map(tokenChip);
}

// Plain text where there is no page.
function featureLink(layer, index, text = String(index)) {
  return saezoo.hasPage(layer, index) ? element("a", { href: addressOf.feature(layer, index) }, text) : text;
}
