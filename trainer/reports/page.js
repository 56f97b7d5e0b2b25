// Shows the values under the pointer. The page is complete without it.
for (const plot of document.querySelectorAll(".plot")) {
  const lines = JSON.parse(plot.dataset.lines);
  const rule = document.createElement("div");
  const tip = document.createElement("div");
  rule.className = "rule";
  tip.className = "tip";
  plot.addEventListener("pointermove", event => {
    const box = plot.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width;
    const near = lines.map(line => line.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const x = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
    tip.replaceChildren(`${plot.dataset.x} ${x[2]}`);
    lines.forEach((line, i) => {
      const name = document.createElement("i");
      name.className = `c${line.color}`;
      name.textContent = `${line.name} `;
      const other = near[i][2] === x[2] ? "" : ` (at ${near[i][2]})`;
      tip.append(document.createElement("br"), name, near[i][3] + other);
    });
    rule.style.left = `${x[0] * 100}%`;
    tip.style.left = x[0] < 0.5 ? `calc(${x[0] * 100}% + .6rem)` : "";
    tip.style.right = x[0] < 0.5 ? "" : `calc(${(1 - x[0]) * 100}% + .6rem)`;
    plot.append(rule, tip);
  });
  plot.addEventListener("pointerleave", () => { rule.remove(); tip.remove(); });
}
