// Hide or show a condition, enlarge a grid, read values off a chart.
for (const button of document.querySelectorAll("nav button"))
  button.onclick = () => {
    const off = button.classList.toggle("off");
    for (const mark of document.querySelectorAll(`svg .${button.dataset.style}`)) mark.classList.toggle("off", off);
  };
for (const image of document.querySelectorAll(".grids img"))
  image.onclick = () => image.parentElement.classList.toggle("large");
for (const svg of document.querySelectorAll("svg[data-curves]")) {
  const { x: [low, high, left, right], curves } = JSON.parse(svg.dataset.curves);
  const xs = [...new Set(curves.flatMap(curve => curve.points.map(point => point[0])))].sort((a, b) => a - b);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const tip = document.createElement("div");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", 10);
  line.setAttribute("y2", 226);
  tip.className = "tip";
  svg.onmousemove = event => {
    const box = svg.getBoundingClientRect();
    const pixel = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = low + (pixel - left) / (right - left) * (high - low);
    const x = xs.reduce((best, value) => Math.abs(value - wanted) < Math.abs(best - wanted) ? value : best);
    const place = left + (x - low) / (high - low) * (right - left);
    line.setAttribute("x1", place);
    line.setAttribute("x2", place);
    tip.replaceChildren(`iteration ${x}`);
    for (const curve of curves) {
      const point = curve.points.find(point => point[0] === x);
      if (!point) continue;
      const row = document.createElement("div"), key = document.createElement("i");
      key.className = curve.style;
      row.append(key, `${point[1]}  ${curve.label}`);
      tip.append(row);
    }
    if (pixel < (left + right) / 2) tip.style.left = `${place / 460 * box.width + 30}px`, tip.style.right = "auto";
    else tip.style.right = `${(460 - place) / 460 * box.width + 30}px`, tip.style.left = "auto";
    svg.append(line);
    svg.parentElement.append(tip);
  };
  svg.onmouseleave = () => { line.remove(); tip.remove(); };
}
