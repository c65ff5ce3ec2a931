// A page opened as a file may start no worker: there, the search runs in a frame, which has the page's rights, with the same messages.
if (location.protocol === "file:") {
  globalThis.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      this.frame = frame;
      const inner = frame.contentWindow;
      inner.document.open();
      inner.document.write("<!doctype html><body></body>");
      inner.document.close();
      inner.postMessage = (data) => setTimeout(() => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        this.onmessage?.(event);
      });
      // A worker waits for each of its scripts; a frame loads them one behind the other, before the first message is handed on.
      const load = (source) => new Promise((loaded, failed) => {
        const script = inner.document.createElement("script");
        Object.assign(script, { src: source, onload: loaded, onerror: failed });
        inner.document.body.append(script);
      });
      this.ready = load(String(url));
      inner.importScripts = (...sources) => (this.ready = sources.reduce(
        (before, source) => before.then(() => load(new URL(source, url).href)), Promise.resolve()));
    }
    postMessage(data) {
      this.ready.then(async () => {
        const inner = this.frame.contentWindow;
        const event = new inner.MessageEvent("message", { data });
        inner.dispatchEvent(event);
      });
    }
    terminate() {
      this.frame.remove();
    }
  };
}
