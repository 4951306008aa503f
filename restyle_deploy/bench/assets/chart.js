"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const svg = document.getElementById("chart");
  const tip = document.getElementById("tip");
  const plot = document.getElementById("plot");
  const metricChoice = document.getElementById("metric");
  const latencyChoice = document.getElementById("latency");
  const logChoice = document.getElementById("log");
  const REACH = 32; // pixels from the pointer to a point that it takes
  const RADIUS = 5;
  const hidden = new Set();
  let shown = []; // points as they are drawn: {line, point, x, y}
  let current = -1; // index of the point that is shown, within `shown`

  const element = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const metricNow = () => data.metrics.find((metric) => metric.name === metricChoice.value);
  const digits = (value) => (value < 100 ? value.toFixed(2) : value.toFixed(0));
  const timeOf = (line, point) =>
    latencyChoice.value === "p95" ? point.p95 : point.median / (latencyChoice.value === "image" ? line.batch : 1);

  /** Return the ends of a point's bar along the times: the median's quartiles, or the p95 and its upper bound. */
  const barOf = (line, point) => {
    const ends = latencyChoice.value === "p95" ? [point.p95, point.bound] : point.quartiles;
    return ends.map((value) => value / (latencyChoice.value === "image" ? line.batch : 1));
  };

  /** Return what is drawn at a point for a shape, about the origin. */
  const shapePath = (shape, r) => {
    const turns = { square: [4, 45, 1.25], diamond: [4, 0, 1.35], triangle: [3, -90, 1.4], down: [3, 90, 1.4] }[shape];
    if (!turns) return `M${r},0A${r},${r} 0 1 1 ${-r},0A${r},${r} 0 1 1 ${r},0Z`;
    const [count, start, scale] = turns;
    const corners = Array.from({ length: count }, (_, index) => {
      const angle = ((start + (360 / count) * index) * Math.PI) / 180;
      return `${(r * scale * Math.cos(angle)).toFixed(2)},${(r * scale * Math.sin(angle)).toFixed(2)}`;
    });
    return `M${corners.join("L")}Z`;
  };

  /** Return round numbers from low to high, about `count` of them. */
  const linearTicks = (low, high, count) => {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const first = Math.ceil(low / step);
    return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, index) => (first + index) * step);
  };

  const logTicks = (low, high) => {
    const ticks = [];
    const factors = high / low < 300 ? [1, 2, 5] : [1];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) ticks.push(factor * 10 ** power);
    const inside = ticks.filter((tick) => tick >= low && tick <= high);
    return inside.length > 1 ? inside : linearTicks(low, high, 3).filter((tick) => tick > 0);
  };

  /** Return a function from [low, high] to [from, to], and its ticks. */
  const makeScale = (low, high, from, to, isLog, count) => {
    const f = isLog ? Math.log : (value) => value;
    const place = (value) => from + ((f(value) - f(low)) / (f(high) - f(low))) * (to - from);
    return { place, ticks: isLog ? logTicks(low, high) : linearTicks(low, high, count) };
  };

  const visiblePoints = () => {
    const { name } = metricNow();
    return data.series
      .filter((line) => !hidden.has(line.name))
      .flatMap((line) => line.points.filter((point) => point.quality[name]).map((point) => ({ line, point })));
  };

  const drawAxes = (size, x, y, metric) => {
    const { left, right, top, bottom } = size;
    const plain = (value) => Number(value.toPrecision(6)).toString();
    const decimals = Math.max(...y.ticks.map((tick) => (plain(tick).split(".")[1] ?? "").length));
    for (const tick of x.ticks) {
      svg.append(element("line", { class: "grid", x1: x.place(tick), x2: x.place(tick), y1: top, y2: bottom }));
      svg.append(element("text", { x: x.place(tick), y: bottom + 16, "text-anchor": "middle" }, plain(tick)));
    }
    for (const tick of y.ticks) {
      svg.append(element("line", { class: "grid", x1: left, x2: right, y1: y.place(tick), y2: y.place(tick) }));
      svg.append(element("text", { x: left - 6, y: y.place(tick) + 4, "text-anchor": "end" }, tick.toFixed(decimals)));
    }
    svg.append(element("path", { class: "axis", fill: "none", d: `M${left},${top}V${bottom}H${right}` }));
    const across = latencyChoice.selectedOptions[0].textContent;
    const under = { class: "title", x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" };
    svg.append(element("text", under, `latency ${across}, ms`));
    const direction = metric.higher ? "higher is better" : "lower is better";
    svg.append(element("text", { class: "title", x: 4, y: 14 }, `${metric.label}, ${direction}`));
  };

  const drawBars = ({ line, point, x, y }, scales, name) => {
    const { low, high } = point.quality[name];
    if (low !== null && high !== null)
      svg.append(element("line", { class: "bar", x1: x, x2: x, y1: scales.y.place(low), y2: scales.y.place(high) }));
    const [first, last] = barOf(line, point).map(scales.x.place);
    svg.append(element("line", { class: "bar", x1: first, x2: last, y1: y, y2: y }));
  };

  const drawLine = (line, scales, name) => {
    const points = shown.filter((item) => item.line === line);
    const group = element("g", { class: "line", "data-name": line.name });
    const route = points.map((item) => `${item.x.toFixed(1)},${item.y.toFixed(1)}`).join("L");
    const dash = line.dash.join(" ") || "none";
    points.forEach((item) => drawBars(item, scales, name));
    if (route)
      group.append(
        element("path", { d: `M${route}`, fill: "none", stroke: line.colour, "stroke-width": 2, "stroke-dasharray": dash })
      );
    for (const { point, x, y } of points)
      group.append(
        element("path", {
          class: "point",
          "data-steps": point.steps,
          d: shapePath(line.shape, RADIUS),
          fill: line.colour,
          transform: `translate(${x.toFixed(1)},${y.toFixed(1)})`,
        })
      );
    svg.append(group);
  };

  /** Number the points that are better than all faster ones; of close ones with the same number, the first. */
  const drawNumbers = (metric) => {
    const sign = metric.higher ? 1 : -1;
    const few = new Set(shown.map((item) => item.line)).size <= 2;
    const written = [];
    let best = -Infinity;
    for (const item of [...shown].sort((a, b) => a.x - b.x)) {
      const value = sign * item.point.quality[metric.name].mean;
      if (!few && value <= best) continue;
      best = Math.max(best, value);
      const isNear = (other) => Math.abs(other.x - item.x) < 26 && Math.abs(other.y - item.y) < 26;
      if (written.some((other) => other.point.steps === item.point.steps && isNear(other))) continue;
      written.push(item);
      const place = { class: "number", x: item.x - 8, y: item.y + (metric.higher ? -6 : 16), "text-anchor": "end" };
      svg.append(element("text", place, item.point.steps));
    }
  };

  const drawDecision = (size, x, low, high) => {
    const { decision } = data;
    if (!decision) return;
    const chosen = shown.find(({ line, point }) => line.name === decision.name && point.steps === decision.steps);
    if (chosen) svg.append(element("circle", { class: "chosen", cx: chosen.x, cy: chosen.y, r: RADIUS * 2 }));
    const budget = decision.budget; // of the p95: on another axis, the line would part other points than it does
    if (budget === null || latencyChoice.value !== "p95" || budget < low || budget > high) return;
    const at = x.place(budget);
    svg.append(element("line", { class: "budget", x1: at, x2: at, y1: size.top, y2: size.bottom }));
    const side = at > (size.left + size.right) / 2 ? { x: at - 4, "text-anchor": "end" } : { x: at + 4 };
    svg.append(element("text", { ...side, y: size.top + 10 }, `budget ${budget} ms`));
  };

  /** Ring the points of the decision's front, where the chart is of the metric that it was judged by. */
  const drawFront = (metric) => {
    if (data.front?.metric !== metric.name) return;
    for (const { line, point, x, y } of shown)
      if (data.front.points.some(([name, steps]) => name === line.name && steps === point.steps))
        svg.append(element("circle", { class: "front", cx: x, cy: y, r: RADIUS + 3 }));
  };

  const rangeOf = (values, isLog) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const margin = Math.max(1.2, (high / low) ** 0.08);
    if (isLog) return [low / margin, high * margin];
    const pad = 0.08 * (high - low) || 0.1 * Math.abs(high) || 1;
    return [low - pad, high + pad];
  };

  const draw = () => {
    svg.replaceChildren();
    hideTip();
    const width = plot.clientWidth;
    const height = Math.round(Math.min(480, Math.max(300, width * 0.55)));
    const size = { left: 52, right: width - 14, top: 26, bottom: height - 46 };
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    const points = data.metrics.length ? visiblePoints() : [];
    if (!points.length) {
      const text = data.metrics.length ? "No line is shown." : "No metric has figures.";
      svg.append(element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, text));
      shown = [];
      return;
    }
    const metric = metricNow();
    const times = points.flatMap(({ line, point }) => [timeOf(line, point), ...barOf(line, point)]);
    const bounds = points
      .map(({ point }) => point.quality[metric.name])
      .flatMap(({ mean, low, high }) => [mean, low ?? mean, high ?? mean]);
    const [low, high] = logChoice.checked ? rangeOf(times, true) : [0, 1.08 * Math.max(...times)];
    const x = makeScale(low, high, size.left, size.right, logChoice.checked, width < 500 ? 4 : 8);
    const y = makeScale(...rangeOf(bounds, false), size.bottom, size.top, false, 6);
    shown = points.map(({ line, point }) => ({
      line,
      point,
      x: x.place(timeOf(line, point)),
      y: y.place(point.quality[metric.name].mean),
    }));
    drawAxes(size, x, y, metric);
    for (const line of new Set(shown.map((item) => item.line))) drawLine(line, { x, y }, metric.name);
    drawFront(metric);
    drawDecision(size, x, low, high);
    drawNumbers(metric);
  };

  const hideTip = () => {
    current = -1;
    tip.hidden = true;
    for (const ring of svg.querySelectorAll(".ring")) ring.remove();
  };

  const show = (index) => {
    const { line, point, x, y } = shown[index];
    hideTip();
    current = index;
    const head = document.createElement("b");
    head.textContent = `${line.label}: ${point.steps} step${point.steps > 1 ? "s" : ""}`;
    const rows = [
      `${digits(point.median)} ms median of a call, IQR ${digits(point.iqr)} ms`,
      `p90 ${digits(point.p90)}, p95 ${digits(point.p95)} (bound ${digits(point.bound)}), p99 ${digits(point.p99)} ms`,
      `${digits(point.throughput)} images/s`,
    ];
    for (const metric of data.metrics) {
      const figures = point.quality[metric.name];
      if (!figures) continue;
      const text = (name) => figures[name]?.toFixed(metric.decimals) ?? "-";
      const hasInterval = figures.low !== null && figures.high !== null;
      rows.push(`${metric.label}: ${text("mean")}${hasInterval ? ` (${text("low")} to ${text("high")})` : ""}`);
      if (metric === metricNow())
        rows.push(`of the images: median ${text("median")}, 5th ${text("p5")}, 95th ${text("p95")} percentile`);
    }
    if (point.unstable) rows.push(`unstable: ${point.unstable}`);
    tip.replaceChildren(head, ...rows.flatMap((row, at) => (at ? [document.createElement("br"), row] : [row])));
    tip.hidden = false;
    svg.append(element("circle", { class: "ring", cx: x, cy: y, r: RADIUS + 4 }));
    const left = x + 14 + tip.offsetWidth > plot.clientWidth ? x - 14 - tip.offsetWidth : x + 14;
    tip.style.left = `${Math.max(0, Math.min(left, plot.clientWidth - tip.offsetWidth))}px`;
    const above = y - tip.offsetHeight - 12;
    tip.style.top = `${above < 0 ? y + 16 : above}px`;
  };

  const showNearest = (event) => {
    const box = svg.getBoundingClientRect();
    const distance = ({ x, y }) => Math.hypot(x - (event.clientX - box.left), y - (event.clientY - box.top));
    const near = shown.map(distance);
    const best = near.indexOf(Math.min(...near));
    if (best < 0 || near[best] > REACH) hideTip();
    else if (best !== current) show(best);
  };

  const goTo = (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") hideTip();
    if (!move || !shown.length) return;
    event.preventDefault();
    show((current + move + (current < 0 && move < 0 ? 1 : 0) + shown.length) % shown.length);
  };

  const makeLegend = () => {
    for (const line of data.series) {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.name = line.name;
      button.setAttribute("aria-pressed", "true");
      const sample = element("svg", { width: 34, height: 16, "aria-hidden": "true" });
      const dash = line.dash.join(" ") || "none";
      const stroke = { stroke: line.colour, "stroke-width": 2, "stroke-dasharray": dash };
      sample.append(element("line", { x1: 0, x2: 34, y1: 8, y2: 8, ...stroke }));
      sample.append(element("path", { d: shapePath(line.shape, RADIUS), fill: line.colour, transform: "translate(17,8)" }));
      button.append(sample, line.label);
      button.addEventListener("click", () => {
        if (!hidden.delete(line.name)) hidden.add(line.name);
        button.setAttribute("aria-pressed", String(!hidden.has(line.name)));
        draw();
      });
      document.getElementById("legend").append(button);
    }
  };

  for (const metric of data.metrics) metricChoice.append(new Option(metric.label, metric.name));
  logChoice.checked = data.logarithmic;
  document.getElementById("controls").hidden = false;
  makeLegend();
  for (const choice of [metricChoice, latencyChoice, logChoice]) choice.addEventListener("change", draw);
  svg.addEventListener("pointermove", showNearest);
  svg.addEventListener("pointerdown", showNearest);
  svg.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hideTip());
  svg.addEventListener("keydown", goTo);
  svg.addEventListener("blur", hideTip);
  // Drawing changes the height: only another width is a reason to draw again.
  let drawnWidth = 0;
  const drawAtNewWidth = () => {
    if (plot.clientWidth === drawnWidth) return;
    drawnWidth = plot.clientWidth;
    draw();
  };
  drawAtNewWidth();
  new ResizeObserver(() => requestAnimationFrame(drawAtNewWidth)).observe(plot);
})();
