// Addresses, keys and what is on every page.
"use strict";

const main = document.getElementById("main");
let current = null; // { layer, update } of the overview that is shown
let steps = 0; // an answer that comes after the next question is dropped

// #/, #/LAYER, #/LAYER/INDEX, each with ?query
function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  try {
    const [layer, index] = path.split("/").map(decodeURIComponent);
    return { layer, index, state: listState.read(query) };
  } catch {
    return { layer: path, state: listState.read("") }; // a % that stands for nothing
  }
}

async function show() {
  const step = ++steps;
  tip.hide();
  try {
    const view = await viewOf(route());
    if (step === steps && view) draw(view);
  } catch (error) {
    if (step === steps) draw(message(error.message, "The site is incomplete or damaged: run the command that wrote it again."));
    console.error(error);
  }
}

async function viewOf({ layer, index, state }) {
  const { saes } = saezoo.manifest;
  const home = [saes[0]?.collection ?? "Features", layer && "#/"];
  if (!layer) {
    crumbs(home);
    return homeView();
  }
  const sae = saezoo.sae(layer);
  if (!sae) return message(`There is no SAE ${layer} here.`, "The list has those that are.");
  if (!sae.written) return message(`${layer} is not written yet.`, "Run the same command again.");
  if (index == null && current?.layer === layer) {
    current.update(state);
    return null;
  }
  await vocabulary.load();
  const columns = await saezoo.list(sae);
  if (index == null) {
    crumbs(home, [layer]);
    document.title = `${sae.collection} ${layer}`;
    const { view, update } = overviewView(sae, columns);
    update(state);
    view.overview = { layer, update };
    return view;
  }
  const place = /^\d+$/.test(index) ? columns.places.get(Number(index)) : undefined;
  if (place == null) return message(`Feature ${index} of ${layer} has no page here.`, `${format.count(columns.index.length)} features have one.`);
  const page = await saezoo.page(sae, place);
  crumbs(home, [layer, addressOf.overview(layer, state)], [String(index)]);
  return featureView(sae, columns, place, page, state);
}

function message(title, text) {
  crumbs([saezoo.manifest?.saes[0]?.collection ?? "Features", "#/"], ["not here"]);
  document.title = title;
  return element("div.message", {}, element("h1", { tabindex: -1 }, title), element("p", {}, text));
}

let drawn = false;

function draw(view) {
  const first = !drawn;
  drawn = true;
  current = view.overview ?? null;
  main.replaceChildren(view);
  alignContexts(main);
  // Where one was before, on the way back; else at the top, where a screen reader goes on reading.
  scrollTo(0, history.state?.y ?? 0);
  if (first) document.documentElement.dataset.drawn = String(Math.round(performance.now())); // ms, for measuring
  else main.querySelector("h1")?.focus({ preventScroll: true });
  dispatchEvent(new Event("drawn"));
}

function themeButton() {
  const next = theme.current() === "dark" ? "light" : "dark";
  document.getElementById("theme-button").textContent = next === "dark" ? "Dark" : "Light";
  document.getElementById("theme-button").setAttribute("aria-label", `${next} theme`);
}

let leader = false; // g was pressed, h may follow

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.closest?.("input, select, textarea");
  if (event.key === "Escape") {
    tip.hide();
    if (typing) typing.blur();
    return;
  }
  if (typing || document.getElementById("keys").open) return;
  const afterLeader = leader;
  leader = event.key === "g";
  const act = {
    j: () => move(1),
    k: () => move(-1),
    "/": focusSearch,
    "?": () => document.getElementById("keys").showModal(),
    h: afterLeader ? up : null,
  }[event.key];
  if (act) {
    event.preventDefault();
    act();
  } else walkTokens(event);
}

// On a feature's page the next or previous one; in a list the next or previous row.
function move(by) {
  if (!current) {
    document.getElementById(by > 0 ? "next" : "previous")?.click();
    return;
  }
  const links = [...main.querySelectorAll(".features tbody th a")];
  const at = links.indexOf(document.activeElement);
  links[at < 0 ? 0 : Math.min(Math.max(at + by, 0), links.length - 1)]?.focus();
}

function up() {
  const { layer, index, state } = route();
  location.hash = index == null || !layer ? "#/" : addressOf.overview(layer, state);
}

function focusSearch() {
  const search = document.getElementById("search");
  if (search) {
    search.focus();
    search.select();
    return;
  }
  const { layer, state } = route();
  if (!saezoo.sae(layer)?.written) return;
  location.hash = addressOf.overview(layer, state);
  addEventListener("drawn", () => document.getElementById("search")?.focus(), { once: true });
}

function wire() {
  history.scrollRestoration = "manual"; // the browser would scroll before the page is drawn
  addEventListener("hashchange", show);
  document.addEventListener("keydown", keys);
  document.getElementById("skip").addEventListener("click", () => main.focus());
  const dialog = document.getElementById("keys");
  document.getElementById("keys-button").addEventListener("click", () => dialog.showModal());
  document.getElementById("keys-close").addEventListener("click", () => dialog.close());
  document.getElementById("theme-button").addEventListener("click", () => {
    theme.toggle();
    themeButton();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", themeButton);
  for (const name of ["mouseover", "focusin", "click"]) {
    main.addEventListener(name, (event) => {
      const token = event.target.closest(".token.on");
      if (token) tip.show(token);
      else tip.hide();
    });
  }
  main.addEventListener("mouseleave", tip.hide);
  addEventListener("scroll", tip.place, { capture: true, passive: true });
  addEventListener("scrollend", () => history.replaceState({ y: scrollY }, ""));
  addEventListener("resize", () => alignContexts(main));
}

async function begin() {
  themeButton();
  document.getElementById("legend").replaceChildren(...legend());
  wire();
  try {
    saezoo.manifest = await saezoo.load("manifest");
  } catch (error) {
    draw(message(error.message, "The site is incomplete or damaged: run the command that wrote it again."));
    return;
  }
  const banner = document.getElementById("banner");
  banner.hidden = saezoo.manifest.complete;
  if (!saezoo.manifest.complete) banner.textContent = "This site is incomplete: its writing was interrupted, or goes on. Run the same command again.";
  await show();
}

begin();
