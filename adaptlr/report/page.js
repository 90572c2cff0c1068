"use strict";
// Three charts over the steps, in step with each other. The data are columns of chosen records.
(() => {
  const runs = JSON.parse(document.getElementById("data").textContent);
  const several = runs.length > 1;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const COLORS = 6;
  const colorOf = (run) => css(`--run${run % COLORS}`);
  const faint = (color, percent) => color + Math.round(percent * 2.55).toString(16).padStart(2, "0");
  const KINDS = {
    skip: "--warn", overflow: "--warn", alarm: "--warn",
    cut: "--bad", restart: "--bad", rescue: "--bad", failed: "--bad",
    run: "--good", kept: "--good", raised: "--good", regrow: "--good",
  };
  const kindColor = (kind) => css(KINDS[kind] || "--note");
  const last = Math.max(...runs.map((run) => run.step.at(-1) ?? 0), 1);
  const first = Math.min(...runs.map((run) => run.step[0] ?? 0));
  const events = runs.flatMap((run, index) =>
    run.events.map(([step, kind, reason]) => ({ step, kind, reason, index })));
  const tip = document.getElementById("tip");
  let charts = [];
  let window_ = [first, last];
  let logLoss = false;

  // -- columns ---------------------------------------------------------------

  const combine = (run, sign) =>
    run.level.map((level, i) => level === null ? null : level + sign * (run.scale[i] ?? 0));

  // One table for a chart: the columns of all runs over the union of their steps.
  const table = (columnsOf) => {
    const tables = runs.map((run) => [run.step, ...columnsOf(run)]);
    return several ? uPlot.join(tables, tables.map((t) => t.map(() => 2))) : tables[0];
  };
  const positive = (column) => column.map((value) => value > 0 ? value : null);

  const number = (value) => value == null ? "–" : Math.abs(value) >= 1e5 || Math.abs(value) < 1e-3 && value !== 0
    ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(4));
  const label = (run, text) => several ? `${run.name} ${text}` : text;

  const lossSeries = (run, index) => {
    const color = colorOf(index);
    const quiet = { width: 0, points: { show: false }, spanGaps: true };
    return [
      { ...quiet, label: label(run, "low"), class: "band" },
      { ...quiet, label: label(run, "high"), class: "band" },
      { label: label(run, "loss"), stroke: faint(color, several ? 25 : 45), width: 1, points: { show: false } },
      { label: label(run, "level"), stroke: color, width: 2, points: { show: false }, spanGaps: true },
    ];
  };
  const perRun = (make) => runs.flatMap(make);
  const line = (run, text, stroke, more) =>
    ({ label: label(run, text), stroke, width: 1.6, points: { show: false }, spanGaps: true, ...more });

  // -- options ---------------------------------------------------------------

  const axis = (more) => {
    const lines = { stroke: css("--grid"), width: 1, ...more.filter && { filter: more.filter } };
    return { stroke: css("--soft"), font: "12px system-ui, sans-serif", grid: lines, ticks: lines, ...more };
  };
  const counted = (value) => value >= 1e6 ? `${+(value / 1e6).toPrecision(4)}M`
    : value >= 1e4 ? `${+(value / 1e3).toPrecision(4)}k` : String(value);
  const xAxis = () => axis({ values: (_, ticks) => ticks.map((t) => Number.isInteger(t) ? counted(t) : ""), size: 34, space: 60 });
  const yAxis = (more) => axis({ size: 58, values: (_, ticks) => ticks.map((t) => t === null ? "" : number(t)), ...more });

  // On a logarithmic axis decades alone are marked, or every tick where there is hardly one.
  const decades = (_, ticks) => {
    const whole = ticks.map((t) => t > 0 && Number.isInteger(+Math.log10(t).toFixed(6)) ? t : null);
    return whole.filter((t) => t !== null).length >= 2 ? whole : ticks;
  };
  const DECADES_SHOWN = 6; // the last steps of a cosine go down to nothing
  const lrRange = (_, low, high) => [Math.max(low, high * 10 ** -DECADES_SHOWN), high].map(
    (end, i) => 10 ** (i ? Math.ceil(Math.log10(end) * 4) / 4 : Math.floor(Math.log10(end) * 4) / 4));

  const valued = (series) => series.map((s) => ({ value: (_, v) => number(v), ...s }));
  const options = (host, height, series, more) => ({
    width: host.clientWidth, height, padding: [14, 18, 0, 0], // the last step is not cut off
    cursor: { sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
    legend: { live: true },
    series: [{ label: "step", value: (_, v) => v == null ? "–" : v.toLocaleString("en") }, ...valued(series)],
    ...more,
    scales: { x: { time: false, range: () => window_ }, ...more.scales },
    axes: [xAxis(), ...more.axes],
    plugins: [marks(), gestures()],
  });

  const heights = () => window.innerWidth <= 720 ? [230, 150, 160] : [340, 170, 190];

  const build = () => {
    charts.forEach((chart) => chart.destroy());
    tip.hidden = true;
    const [lossHeight, lrHeight, slopeHeight] = heights();
    const host = (id) => document.getElementById(id);
    const bands = runs.map((_, r) => ({ series: [4 * r + 2, 4 * r + 1], fill: faint(colorOf(r), 16) }));
    const shown = (column) => logLoss ? positive(column) : column;
    const loss = new uPlot(
      options(host("loss"), lossHeight, perRun(lossSeries), {
        bands, scales: { y: logLoss ? { distr: 3 } : { range: lossRange } },
        axes: [yAxis(logLoss ? { filter: decades } : {})],
      }),
      table((run) => [combine(run, -1), combine(run, 1), run.loss, run.level].map(shown)), host("loss"));
    const lr = new uPlot(
      options(host("lr"), lrHeight, perRun((run, r) => [line(run, "learning rate", colorOf(r))]), {
        scales: { y: { distr: 3, range: lrRange } }, axes: [yAxis({ filter: decades })],
      }),
      table((run) => [positive(run.lr)]), host("lr"));
    const slope = new uPlot(
      options(host("slope"), slopeHeight, perRun((run, r) => [
        line(run, "t-statistic", colorOf(r)),
        line(run, "loss per step", null, { scale: "slope", width: 0 }), // for the legend
      ]), {
        scales: { y: { range: symmetric(4) } }, axes: [yAxis({})],
        hooks: { drawClear: [chance] },
      }),
      table((run) => [run.t_statistic, run.slope]), host("slope"));
    charts = [loss, lr, slope];
    document.querySelectorAll(".swatch").forEach((swatch) => { swatch.style.background = colorOf(+swatch.dataset.run); });
    document.querySelectorAll(".band").forEach((item) => { item.style.display = "none"; });
  };

  const symmetric = (least) => (_, low, high) => {
    const most = Math.max(Math.abs(low ?? 0), Math.abs(high ?? 0), least) * 1.08 || 1;
    return [-most, most];
  };

  // A spike of one step must not press the rest flat: what is far above the levels is cut off
  // at the top; the logarithmic view shows all of it.
  const lossRange = (_, low, high) => {
    let top = -Infinity, bottom = Infinity;
    for (const run of runs) {
      for (let i = 0; i < run.step.length; i++) {
        if (run.step[i] < window_[0] || run.step[i] > window_[1] || run.level[i] === null) continue;
        const reach = 6 * (run.scale[i] ?? 0);
        top = Math.max(top, run.level[i] + reach);
        bottom = Math.min(bottom, run.level[i] - reach);
      }
    }
    if (top === -Infinity) return [low ?? 0, high ?? 1];
    top = Math.min(top, high ?? top);
    bottom = Math.max(bottom, low ?? bottom);
    const margin = 0.06 * (top - bottom) || Math.abs(top) * 0.1 || 1;
    return [bottom - margin, top + margin];
  };

  // Between -3 and 3 standard errors a slope may be chance.
  const chance = (chart) => {
    const { ctx, bbox } = chart;
    const top = chart.valToPos(3, "y", true), bottom = chart.valToPos(-3, "y", true);
    ctx.save();
    ctx.fillStyle = faint(css("--soft"), 12);
    ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
    ctx.restore();
  };

  // -- marks -----------------------------------------------------------------

  const marks = () => ({
    hooks: {
      draw: [(chart) => {
        const { ctx, bbox } = chart, ratio = devicePixelRatio;
        ctx.save();
        ctx.beginPath();
        ctx.rect(bbox.left, bbox.top - 14 * ratio, bbox.width, bbox.height + 14 * ratio);
        ctx.clip();
        for (const event of events) {
          const x = Math.round(chart.valToPos(event.step, "x", true));
          if (x < bbox.left || x > bbox.left + bbox.width) continue;
          ctx.fillStyle = ctx.strokeStyle = kindColor(event.kind);
          ctx.globalAlpha = 0.4;
          ctx.lineWidth = ratio;
          ctx.setLineDash([3 * ratio, 3 * ratio]);
          ctx.beginPath();
          ctx.moveTo(x, bbox.top);
          ctx.lineTo(x, bbox.top + bbox.height);
          ctx.stroke();
          if (chart.root.parentNode.id !== "loss") continue;
          ctx.globalAlpha = 1;
          ctx.beginPath();
          ctx.moveTo(x - 5 * ratio, bbox.top - 11 * ratio);
          ctx.lineTo(x + 5 * ratio, bbox.top - 11 * ratio);
          ctx.lineTo(x, bbox.top - 1 * ratio);
          ctx.fill();
        }
        ctx.restore();
      }],
      ready: [(chart) => {
        chart.over.addEventListener("mousemove", (e) => explain(chart, e.clientX));
        chart.over.addEventListener("mouseleave", () => { tip.hidden = true; });
      }],
    },
  });

  const REACH = 9; // pixels between pointer and mark
  const explain = (chart, pointer) => {
    const box = chart.over.getBoundingClientRect(), left = pointer - box.left;
    const near = events.filter((e) => Math.abs(chart.valToPos(e.step, "x") - left) <= REACH);
    tip.hidden = near.length === 0;
    if (tip.hidden) return;
    tip.replaceChildren(...near.slice(0, 4).map(sentence), ...near.length > 4 ? [more(near.length - 4)] : []);
    const x = box.left + scrollX + left + 14;
    tip.style.left = `${Math.max(8, Math.min(x, scrollX + innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.top + scrollY + 8}px`;
  };
  const sentence = (event) => {
    const p = document.createElement("p"), b = document.createElement("b");
    b.textContent = `${event.kind.replace("_", " ")}, step ${event.step.toLocaleString("en")}`;
    b.style.color = kindColor(event.kind);
    p.append(b, several ? ` ${runs[event.index].name}: ` : " ", event.reason);
    return p;
  };
  const more = (count) => {
    const p = document.createElement("p");
    p.textContent = `and ${count} more; zoom in`;
    return p;
  };

  // -- zoom and pan ----------------------------------------------------------

  const LEAST = 4; // steps
  const show = (low, high) => {
    const width = Math.min(Math.max(high - low, LEAST), last - first || 1);
    const start = Math.min(Math.max((low + high - width) / 2, first), last - width);
    window_ = [start, start + width];
    charts.forEach((chart) => chart.setScale("x", { min: window_[0], max: window_[1] }));
    document.getElementById("charts").dataset.steps = window_.map(Math.round).join(" ");
  };
  const zoom = (factor, at = 0.5) => {
    const [low, high] = window_, width = (high - low) * factor, middle = low + (high - low) * at;
    show(middle - width * at, middle + width * (1 - at));
  };
  const pan = (share) => {
    const [low, high] = window_, way = (high - low) * share;
    const move = Math.min(Math.max(way, first - low), last - high);
    show(low + move, high + move);
  };

  const gestures = () => {
    let from = null;
    const fingers = new Map();
    const spread = () => { const xs = [...fingers.values()]; return Math.abs(xs[0] - xs[1]); };
    return { hooks: {
      setSelect: [(chart) => {
        if (chart.select.width > 3 && from === null) {
          show(chart.posToVal(chart.select.left, "x"), chart.posToVal(chart.select.left + chart.select.width, "x"));
        }
        chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      }],
      ready: [(chart) => {
        const { over } = chart;
        over.addEventListener("mousedown", (e) => { if (e.shiftKey) { from = { x: e.clientX, range: window_ }; e.stopImmediatePropagation(); } }, true);
        addEventListener("mouseup", () => { from = null; });
        over.addEventListener("mousemove", (e) => {
          if (from === null) return;
          const steps = (from.x - e.clientX) / over.clientWidth * (from.range[1] - from.range[0]);
          const move = Math.min(Math.max(steps, first - from.range[0]), last - from.range[1]);
          show(from.range[0] + move, from.range[1] + move);
        });
        over.addEventListener("dblclick", () => show(first, last));
        over.addEventListener("wheel", (e) => {
          if (!e.ctrlKey && !e.metaKey) return;
          e.preventDefault();
          zoom(e.deltaY > 0 ? 1.25 : 0.8, e.offsetX / over.clientWidth);
        }, { passive: false });
        over.addEventListener("pointerdown", (e) => { if (e.pointerType === "touch") fingers.set(e.pointerId, e.clientX); });
        over.addEventListener("pointermove", (e) => {
          if (!fingers.has(e.pointerId)) return;
          const before = fingers.size === 2 ? spread() : 0, x = fingers.get(e.pointerId);
          fingers.set(e.pointerId, e.clientX);
          if (fingers.size === 2 && spread() > 10) zoom(before / spread());
          else if (fingers.size === 1) pan((x - e.clientX) / over.clientWidth);
        });
        for (const name of ["pointerup", "pointercancel"]) {
          over.addEventListener(name, (e) => fingers.delete(e.pointerId));
        }
      }],
    } };
  };

  const actions = {
    in: () => zoom(0.5), out: () => zoom(2), left: () => pan(-0.4), right: () => pan(0.4),
    all: () => show(first, last),
    log: (button) => { logLoss = !logLoss; button.setAttribute("aria-pressed", logLoss); build(); },
  };
  document.querySelectorAll("[data-do]").forEach((button) =>
    button.addEventListener("click", () => actions[button.dataset.do](button)));
  document.querySelectorAll("[data-step]").forEach((button) =>
    button.addEventListener("click", () => {
      const step = +button.dataset.step, reach = Math.max(50, (last - first) / 40);
      show(step - reach, step + reach);
      document.getElementById("charts").scrollIntoView({ behavior: "smooth", block: "start" });
    }));

  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; build(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);
  build();
  document.documentElement.dataset.drawn = String(Math.round(performance.now()));
})();
