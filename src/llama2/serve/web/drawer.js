// A column beside the chat on a wide window, a sheet above it on a narrow one.

/**
 * Holds `node` open or shut. Below `width` px it covers the page: the rest is inert, the shade closes it, and focus goes
 * in and comes back. Above, it stands beside, open by `wide` at first.
 */
export class Drawer {
  constructor(node, { width, wide, shade, rest, buttons }) {
    Object.assign(this, { node, shade, rest, buttons, wide });
    this.narrow = matchMedia(`(max-width: ${width - 0.02}px)`);
    this.narrow.addEventListener("change", () => this.settle());
    shade.addEventListener("click", () => this.covers && this.set(false));
    for (const button of buttons) button.addEventListener("click", () => this.set(!this.open));
    this.settle();
  }

  settle() {
    this.apply(this.narrow.matches ? false : this.wide);
  }

  get covers() {
    return this.open && this.narrow.matches;
  }

  set(open) {
    if (open === this.open) return;
    if (!this.narrow.matches) this.wide = open;
    const inside = this.node.contains(document.activeElement);
    this.apply(open);
    if (open && this.covers) (this.node.querySelector("[autofocus], button, input, textarea") ?? this.node).focus();
    if (!open && (inside || document.activeElement === document.body)) this.buttons.find((button) => button.offsetParent)?.focus();
  }

  apply(open) {
    this.open = open;
    this.node.classList.toggle("open", open);
    this.node.inert = !open;
    this.shade.hidden = !this.covers;
    for (const other of this.rest) other.inert = this.covers;
    for (const button of this.buttons) button.setAttribute("aria-expanded", String(open));
  }
}
