// Tooltips that also work by touch: the text of a mark's <title> (or title attribute) in a box beside the pointer.
// Without this script the browser's own tooltips remain.
(() => {
  const box = document.createElement("div");
  box.className = "tip";
  box.hidden = true;
  document.body.append(box);

  const textOf = (mark) => {
    if (mark.dataset.tip === undefined) {
      const title = mark.querySelector(":scope > title");
      mark.dataset.tip = title ? title.textContent : mark.getAttribute("title") || "";
      if (title) title.remove();
      mark.removeAttribute("title");
    }
    return mark.dataset.tip;
  };

  const show = (event) => {
    const mark = event.target instanceof Element ? event.target.closest(".hit, [title], [data-tip]") : null;
    const text = mark ? textOf(mark) : "";
    box.hidden = !text;
    if (!text) return;
    box.textContent = text;
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - box.offsetWidth - 6);
    const below = event.clientY + 18;
    const fits = below + box.offsetHeight < document.documentElement.clientHeight;
    // the page's policy forbids style attributes in markup; properties set by script are allowed
    box.style.left = Math.max(6, left) + "px";
    box.style.top = (fits ? below : event.clientY - box.offsetHeight - 12) + "px";
  };

  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { box.hidden = true; }, { passive: true });
})();
