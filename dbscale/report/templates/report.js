"use strict";
// Draws the figures that the page holds as Vega-Lite, each when it first comes into view, as wide as the page allows and in its colours.
(() => {
  const packed = Uint8Array.from(atob(document.getElementById("specs").textContent), (c) => c.charCodeAt(0));
  const unpacked = new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();
  const AXIS = 72, GAP = 22, PANEL = 190;

  // Panels wrap, three abreast at most.
  function fitted(spec, width) {
    const own = structuredClone(spec);
    if (own.facet) {
      own.columns = Math.max(1, Math.min(own.columns, Math.floor((width - AXIS + GAP) / (PANEL + GAP))));
      own.spec.width = Math.floor((width - AXIS - GAP * (own.columns - 1)) / own.columns);
      if (own.columns === 1) own.spec.width = Math.min(own.spec.width, 420);
    } else {
      own.width = width;
      own.autosize = { type: "fit-x", contains: "padding" };
    }
    own.config = structuredClone(themes[dark.matches ? "dark" : "light"]);
    if (width < 500) own.config.legend.columns = 2;
    return own;
  }

  // A click on a legend's entry hides an arm and shows it again.
  const isEntry = (item) => item && /^legend-(symbol|label)$/.test(item.mark.role);
  const hasSwitches = (vega) => (vega.signals || []).some((signal) => signal.name === "hidden");
  function withSwitches(vega) {
    if (!hasSwitches(vega)) return vega;
    for (const legend of vega.legends || []) for (const part of ["symbols", "labels"]) {
      const encode = { ...(legend.encode || {})[part], interactive: true };
      encode.update = { ...encode.update, opacity: { signal: "indexof(hidden, datum.value) < 0 ? 1 : 0.3" }, cursor: { value: "pointer" } };
      legend.encode = { ...legend.encode, [part]: encode };
    }
    return vega;
  }
  function listen(view) {
    view.addEventListener("click", (_, item) => {
      if (!isEntry(item)) return;
      const hidden = view.signal("hidden"), arm = item.datum.value;
      view.signal("hidden", hidden.includes(arm) ? hidden.filter((each) => each !== arm) : [...hidden, arm]).runAsync();
    });
  }

  async function draw(element) {
    const width = element.clientWidth;
    if (!width) return;
    drawn.get(element.id)?.finalize();
    // Nothing leaves the page: no editor to open; expressions are interpreted, so that the page may forbid eval.
    const options = { actions: { export: true, source: false, compiled: false, editor: false }, renderer: "svg", ast: true, patch: withSwitches, tooltip: { theme: dark.matches ? "dark" : "light" } };
    const made = await vegaEmbed(element, fitted((await unpacked)[element.id], width), options);
    if (hasSwitches(made.vgSpec)) listen(made.view);
    drawn.set(element.id, made);
  }

  const plots = [...document.querySelectorAll(".plot")];
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  plots.forEach((element) => seen.observe(element));

  const drawAll = () => Promise.all(plots.map((element) => { seen.unobserve(element); return draw(element); }));
  const redraw = () => Promise.all(plots.filter((element) => drawn.has(element.id)).map(draw));
  dark.addEventListener("change", redraw);
  let waiting, width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redraw, 150);
  });
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));

  document.querySelectorAll("input[data-filter]").forEach((input) => input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    document.querySelectorAll("#" + input.dataset.filter + " tbody tr").forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
    });
  }));

  window.dbscaleReport = { drawn, drawAll };
})();
