// Histograms, drawn as wide as there is room, so that their text is as large as the page's at any width.
"use strict";

const HEIGHT = 150;
const FOOT = 34; // for two lines of text under the bars
const HEAD = 16;

// Draws again whenever the width changes.
function responsive(label, draw) {
  const host = element("div.chart", {});
  let width = 0;
  new ResizeObserver(() => {
    if (host.clientWidth === width || !host.clientWidth) return;
    width = host.clientWidth;
    // A bar that has the focus is not there any more afterwards; its follower gets it.
    const focused = host.querySelector(":focus")?.dataset.bar;
    host.replaceChildren(draw(width));
    if (focused != null) host.querySelector(`[data-bar="${focused}"]`)?.focus();
  }).observe(host);
  host.dataset.label = label;
  return host;
}

function frame(width, attributes) {
  return svg("svg", { width, height: HEIGHT + HEAD + FOOT, viewBox: `0 0 ${width} ${HEIGHT + HEAD + FOOT}`, ...attributes });
}

function words(x, y, text, anchor = "middle") {
  const node = svg("text", { x, y, "text-anchor": anchor });
  node.textContent = text;
  return node;
}

// At least a pixel for what is not 0: one firing among thousands is still one.
const tall = (n, most) => (n === 0 ? 0 : Math.max(1.5, (n / most) * HEIGHT));

// [lo, hi, counts] of a feature.
function histogram([lo, hi, counts], label, unit) {
  const most = Math.max(...counts);
  const total = counts.reduce((a, b) => a + b, 0);
  const edge = (i) => lo + ((hi - lo) * i) / counts.length;
  const summary = `${label}: ${format.count(total)} between ${format.number(lo)} and ${format.number(hi)}`;
  return responsive(label, (width) => {
    const picture = frame(width, { role: "img", "aria-label": summary });
    const step = width / counts.length;
    counts.forEach((n, i) => {
      const height = tall(n, most);
      const bar = svg("rect", { class: "bar", x: i * step, y: HEAD + HEIGHT - height, width: Math.max(step - 1, 1), height });
      const title = svg("title");
      title.textContent = `${format.number(edge(i))} to ${format.number(edge(i + 1))}: ${format.plural(n, unit)}`;
      picture.append(svg("g", {}, svg("rect", { class: "area", x: i * step, y: HEAD, width: step, height: HEIGHT }), bar, title));
    });
    const base = HEAD + HEIGHT;
    picture.append(
      svg("line", { class: "axis", x1: 0, x2: width, y1: base + 0.5, y2: base + 0.5 }),
      words(0, 11, `${format.count(most)} in the tallest bar`, "start"),
      words(0, base + 15, format.number(lo), "start"),
      words(width, base + 15, format.number(hi), "end"));
    if (lo < 0 && hi > 0) {
      const zero = (-lo / (hi - lo)) * width;
      picture.append(svg("line", { class: "zero", x1: zero, x2: zero, y1: HEAD, y2: base + 4 }));
      if (zero > 50 && zero < width - 50) picture.append(words(zero, base + 15, "0"));
    }
    return picture;
  });
}

const BIN = 0.25; // powers of ten

// The bin of a density, by its lower edge. Rounded: log10(0.1) may be a hair off.
const binOf = (fires, tokens) => Math.floor(Math.min(Math.log10(fires / tokens), -1e-9) / BIN + 1e-9) * BIN;

function binName(bin) {
  return bin === "dead" ? "dead features" : `density ${format.power(10 ** bin)} to ${format.power(10 ** (bin + BIN))}`;
}

// How often features fire. `choose(bin)` is called with a lower edge or "dead"; `chosen()` says which bar is pressed.
function densityHistogram(columns, tokens, { choose, chosen }) {
  const counts = new Map();
  for (const fires of columns.fires) {
    const bin = fires === 0 ? "dead" : binOf(fires, tokens);
    counts.set(bin, (counts.get(bin) ?? 0) + 1);
  }
  const lowest = binOf(1, tokens);
  const bins = ["dead", ...Array.from({ length: Math.round(-lowest / BIN) }, (_, i) => lowest + i * BIN)];
  const most = Math.max(1, ...counts.values());
  const label = "Features by how often they fire; each bar lists its features";
  return responsive(label, (width) => {
    const picture = frame(width, { role: "group", "aria-label": label });
    const slot = width / (bins.length + 0.6); // the dead stand apart
    const left = (i) => (i === 0 ? 0 : (i + 0.6) * slot);
    const base = HEAD + HEIGHT;
    const at = (power) => left(1) + ((power - lowest) / BIN) * slot;
    for (const [power, name] of [[-2, ">1/100"], [-1, ">1/10"]]) {
      if (power <= lowest) continue;
      picture.append(
        svg("rect", { class: "dense", x: at(power), y: 0, width: width - at(power), height: base }),
        words(at(power) + 3, 11, name, "start"));
    }
    bins.forEach((bin, i) => picture.append(densityBar(bin, i, counts.get(bin) ?? 0)));
    picture.append(words(left(1), 11, `${format.count(most)} in the tallest bar`, "start"),
      svg("line", { class: "axis", x1: 0, x2: slot, y1: base + 0.5, y2: base + 0.5 }),
      svg("line", { class: "axis", x1: left(1), x2: width, y1: base + 0.5, y2: base + 0.5 }),
      words(0, base + 15, "dead", "start"));
    for (let power = Math.ceil(lowest); power < 0; power++) {
      if (at(power) > 50) picture.append(words(at(power), base + 15, `1e${format.minus(String(power))}`));
    }
    picture.append(words(width, base + 15, "1", "end"), words(width, base + 30, "share of tokens on which a feature fires", "end"));

    function densityBar(bin, i, n) {
      const height = tall(n, most);
      const name = `${binName(bin)}: ${format.plural(n, "feature")}`;
      const title = svg("title");
      title.textContent = name;
      const bar = svg("g", { class: bin === "dead" ? "pick dead" : "pick", "data-bar": bin },
        svg("rect", { class: "area", x: left(i), y: HEAD, width: slot, height: HEIGHT }),
        svg("rect", { class: "bar", x: left(i) + 1, y: base - height, width: Math.max(slot - 2, 1), height }), title);
      if (n === 0) return bar;
      for (const [key, value] of Object.entries({ role: "button", tabindex: 0, "aria-label": name, "aria-pressed": chosen() === bin })) {
        bar.setAttribute(key, value);
      }
      const act = () => choose(chosen() === bin ? null : bin);
      bar.addEventListener("click", act);
      bar.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        act();
      });
      return bar;
    }
    return picture;
  });
}

function pressBar(host, bin) {
  for (const bar of host.querySelectorAll("[role=button]")) bar.setAttribute("aria-pressed", bar.dataset.bar === String(bin));
}
