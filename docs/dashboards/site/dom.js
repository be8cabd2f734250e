// Elements. Data become text nodes and properties and nothing else, so no text in them is ever markup.
"use strict";

// element("a.big", { href: "#/" }, "text", [more, children]); what is null or false is left out.
function element(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (value == null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A table with a caption (a heading for those who do not see it, unless `shown`). Cells: text, elements, lists of them.
function table(caption, heads, rows, { shown = false, numbers = [] } = {}) {
  const kind = (i) => (numbers.includes(i) ? "td.number" : "td");
  return element("table", {},
    element(shown ? "caption" : "caption.unseen", {}, caption),
    element("thead", {}, element("tr", {}, heads.map((head, i) =>
      element(numbers.includes(i) ? "th.number" : "th", { scope: "col" }, head)))),
    element("tbody", {}, rows.map((cells) => element("tr", {}, cells.map((cell, i) =>
      i === 0 ? element("th", { scope: "row" }, cell) : element(kind(i), {}, cell))))));
}

function section(title, ...children) {
  const id = `s-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;
  return element("section", { "aria-labelledby": id }, element("h2", { id }, title), ...children);
}

function facts(pairs) {
  return element("dl.facts", {}, pairs.filter(([, value]) => value != null && value !== "")
    .map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}
