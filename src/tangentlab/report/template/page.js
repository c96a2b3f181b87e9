"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  const config = { displayModeBar: false, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", responsive: true };
  const touch = matchMedia("(pointer: coarse)").matches;
  const dark = () => root.dataset.theme === "dark";

  // --- drawing: a plot is drawn when it is about to be seen ------------------------------------------------

  const specOf = (plot) => data.figures[plot.dataset.figure].views[plot.dataset.view][plot.dataset.panel];

  function themed(value, key = "") {
    if (Array.isArray(value)) return value.map((item) => themed(item, key));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([k, item]) => [k, k === "x" || k === "y" || k === "z" ? item : themed(item, k)]));
    return key.endsWith("color") && dark() ? data.dark[value] ?? value : value;
  }

  function draw(plot) {
    const spec = specOf(plot);
    const position = sliderOf(plot)?.valueAsNumber;
    const traces = themed(spec.data);
    const layout = themed(spec.layout);
    const style = getComputedStyle(root);
    layout.hoverlabel.bgcolor = style.getPropertyValue("--card");
    layout.hoverlabel.bordercolor = style.getPropertyValue("--line");
    layout.hoverlabel.font.color = style.getPropertyValue("--ink");
    layout.dragmode = touch ? false : "zoom";
    if (touch) layout.xaxis.fixedrange = layout.yaxis.fixedrange = true;
    if (spec.frames && position !== undefined) traces[0].z = spec.frames[spec.frameAt[position]];
    if (position !== undefined) layout.shapes = (layout.shapes ?? []).concat(cursor(plot, position));
    for (const trace of traces) trace.visible = !hiddenNames(plot).has(trace.name);
    plot.dataset.drawn = "";
    return Plotly.react(plot, traces, layout, config);
  }

  const drawable = (plot) => !plot.closest("[hidden]");
  const redraw = () => plots.filter((plot) => "drawn" in plot.dataset && drawable(plot)).forEach(draw);
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries)
        if (entry.isIntersecting && drawable(entry.target)) {
          observer.unobserve(entry.target);
          draw(entry.target);
        }
    },
    { rootMargin: "400px" },
  );
  plots.forEach((plot) => observer.observe(plot));
  addEventListener("beforeprint", () => plots.filter(drawable).forEach(draw));

  // --- controls of one figure ------------------------------------------------------------------------------

  const figureOf = (element) => element.closest(".figure");
  const sliderOf = (element) => figureOf(element).querySelector("input[type=range]");
  const plotsOf = (figure) => [...figure.querySelectorAll(".plot")];

  for (const button of document.querySelectorAll(".segments button"))
    button.addEventListener("click", () => {
      const figure = figureOf(button);
      for (const other of figure.querySelectorAll(".segments button")) other.setAttribute("aria-pressed", other === button);
      for (const panels of figure.querySelectorAll(".panels")) panels.hidden = panels.dataset.view !== button.dataset.view;
      plotsOf(figure).filter(drawable).forEach(draw);
    });

  // Names in the plots are HTML text: plotly reads mark-up in them.
  const escaped = document.createElement("span");
  function traceName(name) {
    escaped.textContent = name;
    return escaped.innerHTML.replaceAll('"', "&#34;").replaceAll("'", "&#39;");
  }
  function hiddenNames(element) {
    const off = figureOf(element).querySelectorAll('.legend button[aria-pressed="false"]');
    return new Set([...off].map((button) => traceName(button.dataset.name)));
  }
  for (const button of document.querySelectorAll(".legend button"))
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", button.getAttribute("aria-pressed") !== "true");
      plotsOf(figureOf(button)).filter((plot) => "drawn" in plot.dataset && drawable(plot)).forEach(draw);
    });

  // The moment of the slider, in panels over the same time.
  function cursor(plot, position) {
    const slider = data.figures[plot.dataset.figure].slider;
    if (specOf(plot).time !== slider.axis) return [];
    const x = slider.positions[position];
    const color = getComputedStyle(root).getPropertyValue("--muted");
    return [{ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color, width: 1 } }];
  }
  for (const slider of document.querySelectorAll("input[type=range]"))
    slider.addEventListener("input", () => {
      const figure = figureOf(slider);
      const { label, positions } = data.figures[figure.id].slider;
      figure.querySelector("output").textContent = Number(positions[slider.valueAsNumber].toPrecision(4));
      for (const plot of plotsOf(figure)) {
        const spec = specOf(plot);
        const moment = plot.parentElement.querySelector(".moment");
        if (moment) moment.textContent = `${spec.unit} ${spec.moments[spec.frameAt[slider.valueAsNumber]]}`;
        if ("drawn" in plot.dataset && drawable(plot)) draw(plot);
      }
    });

  // --- light and dark --------------------------------------------------------------------------------------

  const toggle = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  function theme(name) {
    root.dataset.theme = name;
    toggle.setAttribute("aria-pressed", name === "dark");
    document.getElementById("theme-name").textContent = name === "dark" ? "Light" : "Dark";
    redraw();
  }
  toggle.hidden = false;
  theme(root.dataset.theme);
  system.addEventListener("change", () => theme(system.matches ? "dark" : "light"));
  toggle.addEventListener("click", () => theme(dark() ? "light" : "dark"));

  // --- where in the page -----------------------------------------------------------------------------------

  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const reading = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) if (entry.isIntersecting) for (const [id, link] of links) link.classList.toggle("here", id === entry.target.id);
    },
    { rootMargin: "-20% 0px -75% 0px" },
  );
  for (const section of document.querySelectorAll("section")) reading.observe(section);
})();
