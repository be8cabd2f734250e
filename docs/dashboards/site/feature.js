// The page of a feature.
"use strict";

const STEPS = 8; // of the ramp in style.css

function featureView(sae, columns, place, page, state) {
  const index = columns.index[place];
  const row = Object.fromEntries(Object.entries(columns).map(([name, column]) => [name, column?.[place]]));
  const largest = row.max ?? 0;
  document.title = `${sae.collection} ${sae.layer} · feature ${index}`;
  return element("article.feature", {},
    featureHead(sae, columns, place, row, state),
    row.fires > 0 && element("div.firing", {}, activationSection(page, row), topTokens(page)),
    element("div.contexts", {}, contexts(page, row, largest)),
    element("div.weights", {}, logitSection(page.logits), neighbourSection(sae, columns, page), coactiveSection(sae, columns, page)));
}

function featureHead(sae, columns, place, row, state) {
  const around = orderOf(columns, sae, state);
  const at = around.indexOf(place);
  const step = (by, text, label) => {
    const other = at < 0 ? undefined : around[at + by];
    return other == null ? null : element("a", { href: addressOf.feature(sae.layer, columns.index[other], state), "aria-label": label, id: by > 0 ? "next" : "previous" }, text);
  };
  const neuronpedia = sae.neuronpedia && element("a", {
    href: `https://www.neuronpedia.org/${sae.neuronpedia.split("/").map(encodeURIComponent).join("/")}/${row.index}`,
    rel: "external noopener noreferrer",
  }, "Neuronpedia");
  return element("header.head", {},
    element("div.title", {},
      element("h1", { tabindex: -1 }, `Feature ${row.index}`),
      element("nav", { "aria-label": "Other features" }, step(-1, "‹ previous", "previous feature"),
        at >= 0 && around.length > 1 && element("span.quiet", {}, `${format.count(at + 1)} of ${format.count(around.length)} in the list`),
        step(1, "next ›", "next feature")),
      neuronpedia),
    row.fires === 0
      ? element("p.dead-note", {}, element("strong", {}, "Dead: "), `did not fire on ${format.count(sae.tokens)} tokens: `
        + `density below ${format.power(format.densityBound(sae.tokens))} with 95 % confidence.`)
      : [facts([
        ["density", format.density(row.fires, sae.tokens)], ["log₁₀ density", format.minus(Math.log10(row.fires / sae.tokens).toFixed(2))],
        ["fires on", format.plural(row.fires, "token")], ["mean where it fires", format.number(row.mean)], ["max", format.number(row.max)],
        ["divergence", format.interval(row.divergence, 2)],
      ]), element("p.quiet", {}, divergenceNote(row.divergence))]);
}

function divergenceNote(measured) {
  const meaning = "Divergence: how far the tokens of the top contexts differ from those of the middle three fifths of the "
    + "firings; 0 the same, 1 none in common. The nearer to 1, the more the top contexts alone mislead.";
  return measured ? meaning : `${meaning} Unknown here: too few firings, or no token in two documents.`;
}

function activationSection(page, row) {
  return section("Activations", page.histogram && histogram(page.histogram, "Activations where it fires", "token"),
    element("p.quiet", {}, `${format.plural(row.fires, "firing")}; 0 is left out.`));
}

function topTokens(page) {
  const some = (stats, caption) => stats.length > 0 && table(caption, ["token", "mean", "share", "fires on"],
    stats.map(([token, mean, share, fires, occurrences]) => [tokenChip(token), format.number(mean), format.percent(share),
      `${format.count(fires)} of ${format.count(occurrences)}`]), { shown: true, numbers: [1, 2, 3] });
  return section("Top tokens",
    some(page.byShare, "By share of the summed activation"), some(page.byMean, "By mean over all their occurrences"));
}

function contexts(page, row, largest) {
  if (row.fires === 0) return section("Contexts", element("p.quiet", {}, "None: it did not fire."));
  const names = page.quantiles.length === 5
    ? ["Largest fifth", "Fourth fifth", "Middle fifth", "Second fifth", "Smallest fifth"]
    : page.quantiles.map((_, i) => `Group ${i + 1}`);
  return section("Contexts",
    element("p.quiet", {}, "Colour: activation as a share of the feature's largest. Underlined: the firing that the line is here for. Point at a token, or walk with the arrow keys, for its value."),
    ramp(),
    contextGroup("Top", "the rows with the largest activations", page.top, largest),
    page.quantiles.map(([lo, hi, firings, examples], i) => contextGroup(names[i],
      `${format.number(lo)} to ${format.number(hi)}, ${format.plural(firings, "firing")}${examples.length < firings ? `, ${examples.length} at random` : ""}`, examples, largest)));
}

function ramp() {
  return element("div.ramp", { "aria-hidden": "true" }, "0",
    Array.from({ length: STEPS }, (_, i) => element(`span.r${i}`, {}, `${Math.round((100 * (i + 1)) / STEPS)}`)), "% of max");
}

function contextGroup(title, detail, examples, largest) {
  return element("section.group", {},
    element("h3", {}, title, " ", element("span.quiet", {}, detail)),
    element("ol.lines", {}, examples.map((example) => contextLine(example, largest))));
}

// [row, document, start, length, position, ids, pairs of place and value]
function contextLine([row, documentIndex, start, length, position, ids, pairs], largest) {
  const values = new Map();
  for (let i = 0; i < pairs.length; i += 2) values.set(pairs[i], pairs[i + 1]);
  const at = position - start;
  const tokens = ids.map((id, place) => contextToken(ids, place, values.get(place), largest, place === at));
  const cut = (there, where) => there && element("span.cut", { title: `the row goes on ${where}` }, "…");
  const value = values.get(at);
  return element("li.line", {},
    element("span.value", { title: "activation" }, format.number(value)),
    element("div.text", { role: "group", "aria-label": `row ${row}, document ${documentIndex}, token ${position} of ${length}` },
      cut(start > 0, "before"), tokens, cut(start + ids.length < length, "after")),
    element("span.where", { title: `document ${documentIndex}, row ${row}, token ${position}` }, `doc ${documentIndex} · row ${row}`));
}

function contextToken(ids, place, value, largest, own) {
  const text = tokenText(ids[place], { ids, place });
  if (value == null) return element("span.token", {}, text);
  const share = largest > 0 ? value / largest : 0;
  const step = Math.min(STEPS - 1, Math.max(0, Math.ceil(share * STEPS) - 1));
  // One stop for the Tab key in each line; arrows go on from there.
  return element(`button.token.on.r${step}${own ? ".own" : ""}`, {
    type: "button", tabindex: own ? 0 : -1, "data-value": value, "data-share": share, "data-id": ids[place],
    "aria-label": `${vocabulary.name(ids[place])}, activation ${format.number(value)}, ${format.percent(share)} of max`,
  }, text);
}

function logitSection(logits) {
  if (!logits) return section("Logits", element("p.quiet", {}, "None: its decoder direction is 0."));
  const some = (tokens, caption) => table(caption, ["token", "logit"],
    tokens.map(([token, logit]) => [tokenChip(token), format.signed(logit)]), { shown: true, numbers: [1] });
  return section("Logits",
    element("p.quiet", {}, "What one unit of the feature adds to each token's logit, the final layer norm taken as linear."),
    histogram(logits.histogram, "Logits it adds", "token"),
    facts([["std", format.number(logits.std)], ["skew", format.number(logits.skew)], ["excess kurtosis", format.number(logits.kurtosis)]]),
    element("div.twins", {}, some(logits.promoted, "Promoted"), some(logits.suppressed, "Suppressed")));
}

function neighbourSection(sae, columns, page) {
  if (!page.neighbours.length) return null;
  const layers = [...new Set(page.neighbours.map(([layer]) => layer))];
  const own = (layer) => layer === sae.layer;
  return section("Nearest decoder directions", layers.map((layer) =>
    table(own(layer) ? `In this SAE (${layer})` : `In ${layer}`, ["feature", "cosine", own(layer) && "top tokens"].filter(Boolean),
      page.neighbours.filter(([other]) => other === layer).map(([, index, cosine]) =>
        [featureLink(layer, index), format.number(cosine), ...(own(layer) ? [hint(columns, index)] : [])]),
      { shown: true, numbers: [1] })));
}

function coactiveSection(sae, columns, page) {
  if (!page.coactive.length) return null;
  return section("Fires together with", table("Features that fire on the same tokens",
    ["feature", "tokens", "Jaccard", "PMI (bits)", "top tokens"],
    page.coactive.map(([index, both, jaccard, pmi]) => [featureLink(sae.layer, index), format.count(both),
      format.number(jaccard, 2), format.number(pmi, 2), hint(columns, index)]),
    { numbers: [1, 2, 3] }));
}

// After the page is in the document: the firing stands at the same place of every line, as in a concordance. Short
// lines get room at their ends. All is measured before anything is changed, else each line would be laid out again.
function alignContexts(root) {
  const lines = [...root.querySelectorAll(".text")].filter((line) => line.querySelector(".own"));
  for (const line of lines) for (const end of ["--before", "--after"]) line.style.removeProperty(end);
  const measured = lines.map((line) => {
    const own = line.querySelector(".own");
    const width = line.clientWidth;
    return { line, width, centre: own.offsetLeft + own.offsetWidth / 2, all: line.lastElementChild.offsetLeft + line.lastElementChild.offsetWidth };
  });
  for (const { line, width, centre, all } of measured) {
    const target = width * 0.6;
    line.style.setProperty("--before", `${Math.max(0, target - centre)}px`);
    line.style.setProperty("--after", `${Math.max(0, width - target - (all - centre))}px`);
  }
  for (const { line, width, centre } of measured) line.scrollLeft = Math.max(0, centre - width * 0.6);
}

// The value of a token: on hover, on focus, on a tap.
const tip = {
  token: null,

  show(token) {
    tip.hide();
    tip.token = token;
    const { value, share, id } = token.dataset;
    const node = document.getElementById("tip");
    node.replaceChildren(element("bdi", {}, vocabulary.name(Number(id))), ` ${format.number(Number(value))} (${format.percent(Number(share))} of max)`);
    node.hidden = false;
    token.setAttribute("aria-describedby", "tip");
    tip.place();
  },

  place() {
    if (!tip.token) return;
    const node = document.getElementById("tip");
    const box = tip.token.getBoundingClientRect();
    const right = document.documentElement.clientWidth - node.offsetWidth - 4;
    const above = box.top - node.offsetHeight - 6;
    node.style.left = `${Math.max(4, Math.min(box.left + (box.width - node.offsetWidth) / 2, right))}px`;
    node.style.top = `${above > 0 ? above : box.bottom + 6}px`;
  },

  hide() {
    document.getElementById("tip").hidden = true;
    tip.token?.removeAttribute("aria-describedby");
    tip.token = null;
  },
};

// Arrow keys among the tokens on which the feature fires.
function walkTokens(event) {
  const token = event.target.closest?.(".token.on");
  if (!token) return;
  const line = token.closest(".text");
  const tokens = [...line.querySelectorAll(".on")];
  const lines = [...document.querySelectorAll(".text")];
  const next = {
    ArrowLeft: () => tokens[tokens.indexOf(token) - 1],
    ArrowRight: () => tokens[tokens.indexOf(token) + 1],
    ArrowUp: () => lines[lines.indexOf(line) - 1]?.querySelector(".own"),
    ArrowDown: () => lines[lines.indexOf(line) + 1]?.querySelector(".own"),
  }[event.key];
  if (!next) return;
  event.preventDefault();
  next()?.focus();
}
