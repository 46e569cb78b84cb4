// Runs before the first paint, so that a chosen theme does not flash. Not a module: those run later.
(() => {
  const KEY = "llama2.theme";
  const root = document.documentElement;
  const read = () => {
    try {
      return localStorage.getItem(KEY) ?? "auto";
    } catch {
      return "auto";
    }
  };
  const apply = (theme) => {
    if (theme === "auto") delete root.dataset.theme;
    else root.dataset.theme = theme;
  };
  apply(read());
  globalThis.theme = {
    get: read,
    set(theme) {
      apply(theme);
      try {
        localStorage.setItem(KEY, theme);
      } catch {
        // storage refused: the theme holds until the page is left
      }
    },
  };
})();
