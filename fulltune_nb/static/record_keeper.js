// Writes records into the notebook that is open in this page; fulltune_nb/record_keeper.py says why, and sends them.

// `outputs` are [data, metadata] of the record's outputs, which follow each other; the last one's HTML has the class `place`.
function write(notebook, place, outputs) {
  for (const cell of notebook.cells) {
    const there = cell.outputs;
    for (let last = outputs.length - 1; last < (there?.length ?? 0); last++) {
      if (!String(there.get(last).data["text/html"] ?? "").includes(`class="${place} `)) continue;
      outputs.forEach(([data, metadata], number) => {
        const index = last - outputs.length + 1 + number, old = there.get(index).data;
        if (Object.entries(data).every(([kind, content]) => old[kind] === content)) return; // this page has heard of it
        there.set(index, { output_type: "display_data", data, metadata });
      });
    }
  }
}

export default {
  initialize({ model }) {
    const notebook = model.widget_manager?.context?.model; // of JupyterLab and Notebook 7
    if (!notebook?.cells) return;
    model.on("msg:custom", ({ place, outputs }) => write(notebook, place, outputs));
    model.send({ kind: "loaded" });
  },
};
