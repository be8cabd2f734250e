// Light or dark, before anything is drawn: a page that is dark only after its scripts have run flashes.
"use strict";

const theme = {
  // Browsers may refuse storage to a page from a disk; the choice then lasts as long as the page.
  stored() {
    try {
      return localStorage.getItem("saezoo-theme");
    } catch {
      return null;
    }
  },

  current() {
    const chosen = document.documentElement.dataset.theme;
    return chosen || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  },

  toggle() {
    const next = theme.current() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("saezoo-theme", next);
    } catch {
      // as in stored()
    }
  },
};

if (["light", "dark"].includes(theme.stored())) document.documentElement.dataset.theme = theme.stored();
