"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const boxes = [...document.querySelectorAll(".chart")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const finger = matchMedia("(pointer: coarse)");

  // Charts name the page's colours; each drawing takes those of the present scheme.
  function resolved(value, style) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((v) => resolved(v, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, resolved(v, style)]));
    }
    return value;
  }

  function draw() {
    const style = getComputedStyle(document.documentElement);
    return Promise.all(boxes.map((box) => {
      const chart = resolved(data.charts[box.dataset.chart], style);
      const isMap = box.dataset.chart === "map";
      if (isMap && !finger.matches) chart.layout.dragmode = "zoom";
      if (box.clientWidth < 500 && chart.layout.showlegend) chart.layout.height += 56;  // it wraps there
      const config = { responsive: true, displayModeBar: isMap && !finger.matches, displaylogo: false,
        modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]] };
      return Plotly.react(box, chart.data, chart.layout, config);
    }));
  }

  // The map's card: text is set as text, the picture is one of the page's own.
  function follow(box) {
    const card = document.getElementById("card");
    const line = (text) => {
      const span = document.createElement("span");
      span.textContent = text;
      card.append(span);
    };
    box.on("plotly_hover", ({ points, event }) => {
      const point = data.map[points[0].customdata];
      card.replaceChildren();
      if (point.src) {
        const picture = document.createElement("img");
        picture.src = point.src;
        picture.alt = "";
        card.append(picture);
      }
      if (point.name) line(`${point.name} ${point.score.toFixed(2)}`);
      if (point.label !== undefined) line(`label ${point.label}`);
      line(point.id);
      card.hidden = false;
      const at = card.getBoundingClientRect();
      const x = event.clientX ?? innerWidth / 2, y = event.clientY ?? innerHeight / 2;
      card.style.left = `${Math.max(8, Math.min(x + 16, innerWidth - at.width - 8))}px`;
      card.style.top = `${Math.max(8, y + 16 + at.height > innerHeight ? y - at.height - 16 : y + 16)}px`;
    });
    box.on("plotly_unhover", () => { card.hidden = true; });
    addEventListener("scroll", () => { card.hidden = true; }, { passive: true });
  }

  draw().then(() => {
    boxes.filter((box) => box.dataset.chart === "map").forEach(follow);
    document.documentElement.dataset.drawn = "yes";
  });
  dark.addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
})();
