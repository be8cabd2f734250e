// Data come as scripts with one call of saezoo.take: a page from a disk may load scripts, and nothing else.
// saezoo/features/pages.py writes them, and has the other half of their format.
"use strict";

const saezoo = {
  taken: new Map(), // name -> promise of the value
  waiting: new Map(), // name -> resolve

  take(name, packed) {
    const value = unpacked(packed).catch(() => {
      throw new Error(`data/${name}.js is damaged`);
    });
    saezoo.waiting.get(name)?.(value);
  },

  load(name) {
    if (!saezoo.taken.has(name)) {
      saezoo.taken.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        saezoo.waiting.set(name, resolve);
        script.src = `data/${name}.js`;
        script.onload = () => {
          script.remove();
          // A file that was cut off is a syntax error, which counts as loaded. Does nothing if `take` was called.
          reject(new Error(`data/${name}.js is damaged`));
        };
        script.onerror = () => {
          script.remove();
          saezoo.taken.delete(name);
          reject(new Error(`data/${name}.js is missing`));
        };
        document.head.append(script);
      }));
    }
    return saezoo.taken.get(name);
  },

  // Features are read a file at a time; a few files stay, for the neighbours that j and k ask for.
  shards: [],

  async page(sae, place) {
    const size = saezoo.manifest.shard;
    const name = `${sae.folder}/${Math.floor(place / size)}`;
    saezoo.shards = [...saezoo.shards.filter((other) => other !== name), name];
    if (saezoo.shards.length > 8) saezoo.taken.delete(saezoo.shards.shift());
    return (await saezoo.load(name))[place % size];
  },

  async list(sae) {
    const columns = await saezoo.load(`${sae.folder}/list`);
    columns.places ??= new Map(columns.index.map((index, place) => [index, place]));
    return columns;
  },

  sae(layer) {
    return saezoo.manifest.saes.find((sae) => sae.layer === layer);
  },

  hasPage(layer, index) {
    const sae = saezoo.sae(layer);
    return Boolean(sae?.written && sae.features.some(([start, stop]) => start <= index && index < stop));
  },
};

// From base64 of deflated JSON.
async function unpacked(text) {
  const letters = atob(text);
  const values = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) values[i] = letters.charCodeAt(i);
  return new Response(new Blob([values]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
}
