// Pages opened from a disk may not start web workers, in which the site's search runs. There it runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      this.ready = new Promise((loaded) => (frame.onload = () => loaded(frame.contentWindow)));
      this.answered = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      frame.hidden = true;
      frame.srcdoc = `<script>postMessage = (data) => frameElement.worker.answered(data)</script><script src="${url}"></script>`;
      frame.worker = this;
      document.body.append(frame);
    }

    async postMessage(data) {
      const target = await this.ready;
      target.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
