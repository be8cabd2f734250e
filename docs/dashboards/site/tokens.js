// Tokens, shown as what they are: nothing in them is invisible, reorders the line, or looks like something else.
"use strict";

const vocabulary = {
  tokens: [],
  special: new Set(),

  async load() {
    if (vocabulary.tokens.length) return;
    const { tokens, special } = await saezoo.load("tokens");
    vocabulary.tokens = tokens;
    vocabulary.special = new Set(special);
  },

  // For searching, sorting and titles. Half a letter is its bytes.
  text(id) {
    const token = vocabulary.tokens[id];
    if (token == null || token === "") return `id ${id}`;
    return typeof token === "string" ? token : token.map(hex).join(" ");
  },

  lower(id) {
    vocabulary.lowered ??= [];
    return (vocabulary.lowered[id] ??= vocabulary.text(id).toLowerCase());
  },

  // In a sentence: every letter that does not print is spelled out.
  name(id) {
    const token = vocabulary.tokens[id];
    if (token == null || token === "") return `unknown id ${id}`;
    if (typeof token !== "string") return `bytes ${token.map(hex).join(" ")}`;
    return `“${[...token].map((letter) => (letter === " " ? letter : escaped(letter) ?? MARKS[letter]?.[0] ?? letter)).join("")}”`;
  },
};

const hex = (byte) => byte.toString(16).toUpperCase().padStart(2, "0");
const codePoint = (letter) => `U+${letter.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

const MARKS = { "\n": ["↵", "line feed"], "\t": ["⇥", "tab"], "\r": ["␍", "carriage return"] };
// Controls, formats (bidi overrides and zero-width letters among them), private and unassigned letters, separators but
// the ordinary space, what draws nothing, and the letters that serve as marks here.
const UNSEEN = /[\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Zl}\p{Zp}\p{Zs}\p{Default_Ignorable_Code_Point}↵⇥␍·◌]/u;

function escaped(letter) {
  return letter !== " " && !MARKS[letter] && UNSEEN.test(letter) ? codePoint(letter) : null;
}

// The pieces of a text: runs of letters as they are, and marks.
function letters(text) {
  const pieces = [];
  let run = "";
  const flush = () => {
    // An accent without its letter would sit on the token before.
    if (run) pieces.push(/^\p{M}/u.test(run) ? element("span.mark", {}, "◌") : null, run);
    run = "";
  };
  for (const letter of text) {
    const code = escaped(letter);
    if (letter !== " " && !code && !MARKS[letter]) {
      run += letter;
      continue;
    }
    flush();
    // The dot of a space is drawn behind a real space, so that what is copied is the text.
    if (letter === " ") pieces.push(element("span.space", {}, " "));
    else if (code) pieces.push(element("span.code", {}, code));
    else pieces.push(element("span.mark", { title: MARKS[letter][1] }, MARKS[letter][0]));
  }
  flush();
  return pieces;
}

// Whole letters as text, the bytes of broken ones as a chip.
function bytes(values) {
  const pieces = [];
  let broken = [];
  const flush = () => {
    if (broken.length) pieces.push(element("span.code", {}, broken.map(hex).join(" ")));
    broken = [];
  };
  for (let i = 0; i < values.length;) {
    const whole = letterAt(values, i);
    if (whole == null) broken.push(values[i++]);
    else {
      flush();
      pieces.push(letters(whole.text));
      i += whole.length;
    }
  }
  flush();
  return pieces;
}

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

function letterAt(values, start) {
  const first = values[start];
  const length = first < 0x80 ? 1 : first < 0xc0 ? 0 : first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  if (!length || start + length > values.length) return null;
  try {
    return { length, text: decoder.decode(new Uint8Array(values.slice(start, start + length))) };
  } catch {
    return null;
  }
}

// Which letters the token at `place` is a part of, found together with its neighbours in `ids`.
function wholeLetters(ids, place) {
  const isBytes = (i) => Array.isArray(vocabulary.tokens[ids[i]]) && !vocabulary.special.has(ids[i]);
  let first = place;
  let last = place;
  while (first > 0 && isBytes(first - 1)) first--;
  while (last + 1 < ids.length && isBytes(last + 1)) last++;
  const run = ids.slice(first, last + 1).map((id) => vocabulary.tokens[id]);
  const values = run.flat();
  const begin = run.slice(0, place - first).flat().length;
  const end = begin + vocabulary.tokens[ids[place]].length;
  let found = "";
  for (let i = 0; i < values.length;) {
    const whole = letterAt(values, i);
    if (whole && i < end && i + whole.length > begin) found += whole.text;
    i += whole?.length ?? 1;
  }
  return found;
}

// A token by itself, isolated so that Hebrew or Arabic do not reorder those around it.
function tokenText(id, { ids = null, place = 0 } = {}) {
  const token = vocabulary.tokens[id];
  if (token == null || token === "") return element("bdi.code", { title: "the tokenizer does not know this id" }, `id ${id}`);
  if (vocabulary.special.has(id)) return element("bdi.special", { title: "special token" }, letters(vocabulary.text(id)));
  if (typeof token === "string") return element("bdi", {}, letters(token));
  const whole = ids ? wholeLetters(ids, place) : "";
  const title = whole
    ? `bytes ${token.map(hex).join(" ")}: with its neighbours ${whole}`
    : `bytes ${token.map(hex).join(" ")}: part of a letter`;
  return element("bdi", { title }, bytes(token));
}

// What is too long for its place is cut off, and then in the title.
function tokenChip(id) {
  const name = vocabulary.name(id);
  return element("span.chip", { title: name.length > 14 ? name : null }, tokenText(id));
}

function legend() {
  const rows = [
    [element("span.token", {}, letters(" the")), "a space before the word: the dot stands for the space"],
    [element("span.token", {}, letters("\n\t\r")), "line feed, tab, carriage return"],
    [element("span.code", {}, "E2 80"), "bytes that are only part of a letter; point at them for the whole one"],
    [element("span.code", {}, "U+200B"), "a letter that draws nothing, or would reorder the line, or is one of the signs used here"],
    [element("span.mark", {}, "◌"), "an accent follows without its letter"],
    [element("span.special", {}, "<|endoftext|>"), "a special token, which is not scored"],
    [element("span.code", {}, "id 50300"), "an id that the tokenizer does not know"],
  ];
  return rows.map(([sign, meaning]) => element("div", {}, element("dt", {}, sign), element("dd", {}, meaning)));
}
