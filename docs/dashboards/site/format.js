// Numbers as text. What is not known is a dash, never 0.
"use strict";

const UNKNOWN = "–";
const grouped = new Intl.NumberFormat("en");

const format = {
  count: (n) => (n == null ? UNKNOWN : grouped.format(n)),

  // `digits` significant ones, with a real minus, and powers of ten only where zeros would hide the number.
  number(x, digits = 3) {
    if (x == null) return UNKNOWN;
    if (x === 0) return "0";
    const size = Math.abs(x);
    if (size < 1e-3 || size >= 1e7) return format.minus(x.toExponential(digits - 1).replace("e+", "e"));
    if (size >= 10 ** digits) return format.minus(grouped.format(Math.round(x)));
    return format.minus(x.toPrecision(digits));
  },

  signed: (x, digits = 3) => (x > 0 ? `+${format.number(x, digits)}` : format.number(x, digits)),

  minus: (text) => text.replace(/^-/, "−"),

  power: (x) => x.toExponential(1).replace("e+", "e"),

  percent: (x) => (x == null ? UNKNOWN : `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)} %`),

  // 1 in 1,234 (8.1e-4)
  density(fires, tokens) {
    if (fires === 0) return "dead";
    const every = tokens / fires;
    return `1 in ${every < 10 ? every.toFixed(1) : grouped.format(Math.round(every))} (${format.power(fires / tokens)})`;
  },

  // What not firing once says: a feature of this density is silent for so long in one text of twenty.
  densityBound: (tokens) => -Math.expm1(Math.log(0.05) / tokens),

  interval(measured, digits = 3) {
    if (!measured) return UNKNOWN;
    const [value, lo, hi] = measured;
    const own = format.number(value, digits);
    return lo == null ? own : `${own} [${format.number(lo, digits)}, ${format.number(hi, digits)}]`;
  },

  plural: (n, one, many = `${one}s`) => `${format.count(n)} ${n === 1 ? one : many}`,
};
