// A small live plot of one figure over the last minutes.

import { html, useEffect, useRef } from "./vendor/htm-preact.js";

const HEIGHT = 60;
export const WINDOW_S = 300;
// Shown at least, so that the first points do not fill the whole width.
const LEAST_S = 30;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function options(width, top) {
  return {
    width,
    height: HEIGHT,
    padding: [4, 0, 2, 0],
    cursor: { show: false },
    legend: { show: false },
    select: { show: false },
    axes: [{ show: false }, { show: false }],
    scales: {
      x: { time: true, range: (_plot, low, high) => [Math.min(low, high - LEAST_S), high] },
      y: { range: (_plot, _low, high) => [0, top ?? Math.max(1, (high ?? 0) * 1.25)] },
    },
    series: [
      {},
      { stroke: color("--plot"), fill: color("--plot-fill"), width: 1.5, points: { show: false } },
    ],
  };
}

// `points` is [[seconds], [values]]; `top` the largest value there can be, where there is one.
export function Plot({ points, top, label }) {
  const place = useRef();
  const plot = useRef(null);
  useEffect(() => {
    function make() {
      plot.current?.destroy();
      const width = Math.max(40, place.current.clientWidth);
      plot.current = new uPlot(options(width, top), points, place.current);
    }
    make();
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", make);
    const resized = new ResizeObserver(() => {
      const width = Math.max(40, place.current.clientWidth);
      if (width !== plot.current.width) plot.current.setSize({ width, height: HEIGHT });
    });
    resized.observe(place.current);
    return () => {
      dark.removeEventListener("change", make);
      resized.disconnect();
      plot.current.destroy();
      plot.current = null;
    };
  }, [top]);
  useEffect(() => { plot.current?.setData(points); }, [points]);
  return html`<div class="plot" ref=${place} role="img" aria-label=${label}></div>`;
}
