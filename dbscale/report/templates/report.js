"use strict";
// Draws the figures that the page holds as JSON, each when it first comes into view, and switches arms, scales and settings.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const hidden = new Set();
  let scale = "log";
  // Nothing leaves the page: Plotly would offer to send a chart to its makers.
  const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"], toImageButtonOptions: { format: "svg" } };
  const drawn = new Map();

  const armOf = (trace) => (trace.meta || {}).arm;
  const isErrorAxis = (name, axis) => name.startsWith("yaxis") && axis && axis.tickformat === ".3~%";

  function draw(element) {
    const figure = figures[element.id];
    if (!figure || drawn.has(element.id)) return Promise.resolve();
    drawn.set(element.id, element);
    for (const trace of figure.data) if (hidden.has(armOf(trace))) trace.visible = false;
    for (const [name, axis] of Object.entries(figure.layout)) if (isErrorAxis(name, axis) && element.dataset.scale && scale === "linear") { axis.type = scale; axis.tickmode = "auto"; }
    return Plotly.newPlot(element, figure.data, figure.layout, config);
  }

  const visible = (element) => element.offsetParent !== null;
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { observer.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  const plots = [...document.querySelectorAll(".plot")];
  plots.forEach((element) => observer.observe(element));

  function drawAll() { plots.filter(visible).forEach((element) => { draw(element); Plotly.Plots.resize(element); }); }
  const parts = [...document.querySelectorAll("div[data-setting]")];
  let unprinted = [];
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll(".notes details").forEach((d) => { d.open = true; });
    unprinted = parts.filter((part) => part.hidden);
    unprinted.forEach((part) => { part.hidden = false; });
    drawAll();
  });
  window.addEventListener("afterprint", () => unprinted.forEach((part) => { part.hidden = true; }));

  function press(button, on) { button.setAttribute("aria-pressed", on ? "true" : "false"); }

  document.querySelectorAll("button[data-arm]").forEach((button) => button.addEventListener("click", () => {
    const arm = button.dataset.arm, show = hidden.has(arm);
    if (show) hidden.delete(arm); else hidden.add(arm);
    press(button, show);
    for (const [id, element] of drawn) {
      const indices = figures[id].data.flatMap((trace, i) => (armOf(trace) === arm ? [i] : []));
      if (indices.length) Plotly.restyle(element, { visible: show }, indices);
    }
  }));

  document.querySelectorAll("button[data-scale]").forEach((button) => button.addEventListener("click", () => {
    scale = button.dataset.scale;
    document.querySelectorAll("button[data-scale]").forEach((other) => press(other, other === button));
    for (const [id, element] of drawn) {
      if (!element.dataset.scale) continue;
      const change = {};
      for (const [name, axis] of Object.entries(figures[id].layout)) if (isErrorAxis(name, axis)) {
        change[name + ".type"] = scale; change[name + ".autorange"] = true; change[name + ".tickmode"] = scale === "log" ? "array" : "auto";
      }
      Plotly.relayout(element, change);
    }
  }));

  document.querySelectorAll("button[data-setting]").forEach((button) => button.addEventListener("click", () => {
    document.querySelectorAll("button[data-setting]").forEach((other) => press(other, other === button));
    parts.forEach((part) => { part.hidden = part.dataset.setting !== button.dataset.setting; });
    plots.filter(visible).forEach((element) => { if (drawn.has(element.id)) Plotly.Plots.resize(element); });
  }));

  document.querySelectorAll("input[data-filter]").forEach((input) => input.addEventListener("input", () => {
    const wanted = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    document.querySelectorAll("#" + input.dataset.filter + " tbody tr").forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every((word) => text.includes(word));
    });
  }));

  window.dbscaleReport = { figures, drawn, drawAll };
})();
