// Dark or light, before anything is drawn: what the reader chose here earlier, else what the system says. No module, so
// that it runs first. `fluxresTheme()` changes to the other one and returns its name.
(() => {
  const KEY = "fluxres.theme";
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const system = () => (dark.matches ? "dark" : "light");
  const stored = () => {
    const value = localStorage.getItem(KEY);
    return value === "dark" || value === "light" ? value : null;
  };
  const apply = () => {
    root.dataset.theme = stored() ?? system();
    return root.dataset.theme;
  };
  window.fluxresTheme = () => {
    const other = root.dataset.theme === "dark" ? "light" : "dark";
    // The system's own is not stored, so that the page goes on following the system.
    if (other === system()) localStorage.removeItem(KEY);
    else localStorage.setItem(KEY, other);
    return apply();
  };
  dark.addEventListener("change", apply);
  apply();
})();
