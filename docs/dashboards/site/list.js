// Which features, in which order: the state of a list is the query of its address, so that the back button, a reload
// and a link restore it, and so that j and k on a feature's page know what comes next.
"use strict";

const SEARCHES = { token: "top tokens contain", logit: "promotes", index: "index" };

// Of a column: how a feature sorts. Unknown comes last, whichever way.
const SORTS = {
  index: (columns, place) => columns.index[place],
  token: (columns, place) => sortable(columns.tokens[place][0]),
  density: (columns, place) => columns.fires[place],
  mean: (columns, place) => columns.mean[place],
  max: (columns, place) => columns.max[place],
  skew: (columns, place) => columns.skew[place],
  kurtosis: (columns, place) => columns.kurtosis[place],
  // By the lower end: what is high for certain comes first, not what rests on three firings.
  divergence: (columns, place) => columns.divergence[place]?.[1] ?? null,
  logit: (columns, place) => sortable(columns.promoted[place][0]),
};

const sortable = (id) => (id == null ? null : vocabulary.lower(id).trimStart());

const listState = {
  read(query) {
    const given = new URLSearchParams(query);
    const sort = given.get("sort") ?? "index";
    const bin = given.get("bin");
    return {
      sort: sort.replace(/^-/, "") in SORTS ? sort : "index",
      by: given.get("by") in SEARCHES ? given.get("by") : "token",
      q: given.get("q") ?? "",
      bin: bin === "dead" ? bin : bin == null || Number.isNaN(Number(bin)) ? null : Number(bin),
      page: Math.max(1, Math.floor(Number(given.get("page"))) || 1),
    };
  },

  // "" for the list as it is without any choice.
  write(state) {
    const query = new URLSearchParams();
    if (state.sort !== "index") query.set("sort", state.sort);
    if (state.by !== "token") query.set("by", state.by);
    if (state.q) query.set("q", state.q);
    if (state.bin != null) query.set("bin", state.bin);
    if (state.page > 1) query.set("page", state.page);
    return query.size ? `?${query}` : "";
  },
};

const addressOf = {
  overview: (layer, state) => `#/${encodeURIComponent(layer)}${state ? listState.write(state) : ""}`,
  feature: (layer, index, state) => `#/${encodeURIComponent(layer)}/${index}${state ? listState.write(state) : ""}`,
};

// The features that match, as places in the columns. The last answer is kept: j and k ask again and again.
let lastOrder = { key: null };

function orderOf(columns, sae, state) {
  const key = JSON.stringify([sae.folder, state.sort, state.q && state.by, state.q, state.bin]);
  if (lastOrder.key !== key) lastOrder = { key, places: sorted(columns, matching(columns, sae, state), state.sort) };
  return lastOrder.places;
}

function matching(columns, sae, { q, by, bin }) {
  let places = [...columns.index.keys()];
  if (bin != null) {
    places = places.filter((place) => {
      const fires = columns.fires[place];
      return bin === "dead" ? fires === 0 : fires > 0 && binOf(fires, sae.tokens) === bin;
    });
  }
  if (!q) return places;
  if (by === "index") return places.filter((place) => String(columns.index[place]).startsWith(q.trim()));
  // Each token is looked at once, however many features have it.
  const wanted = q.toLowerCase();
  const known = new Map();
  const has = (id) => {
    if (!known.has(id)) known.set(id, vocabulary.lower(id).includes(wanted));
    return known.get(id);
  };
  const column = by === "token" ? columns.tokens : columns.promoted;
  return places.filter((place) => column[place].some(has));
}

function sorted(columns, places, sort) {
  const descending = sort.startsWith("-");
  const key = SORTS[sort.replace(/^-/, "")];
  const keys = new Map(places.map((place) => [place, key(columns, place)]));
  const sign = descending ? -1 : 1;
  return places.sort((a, b) => {
    const [one, other] = [keys.get(a), keys.get(b)];
    if (one === other) return a - b;
    if (one == null) return 1;
    if (other == null) return -1;
    return one < other ? -sign : sign;
  });
}
