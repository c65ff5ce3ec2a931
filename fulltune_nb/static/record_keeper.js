// Writes records into the notebook that is open in this page; fulltune_nb/record_keeper.py says why, and sends them.

// `outputs` are [data, metadata] of the record's outputs, which follow each other; the last one's HTML has the class `place`.
// A cell of the id `empty` gets them where they are nowhere and it has none: the page was loaded anew before they were saved.
function write(notebook, place, outputs, empty) {
  const made = outputs.map(([data, metadata]) => ({ output_type: "display_data", data, metadata }));
  for (const cell of notebook.cells) {
    const there = cell.outputs;
    for (let last = made.length - 1; last < (there?.length ?? 0); last++) {
      if (!String(there.get(last).data["text/html"] ?? "").includes(`class="${place} `)) continue;
      made.forEach((output, number) => {
        const index = last - made.length + 1 + number, old = there.get(index).data;
        if (Object.entries(output.data).some(([kind, content]) => old[kind] !== content)) there.set(index, output);
      });
      return;
    }
  }
  const cell = [...notebook.cells].find((other) => other.id === empty);
  if (cell?.outputs?.length === 0) made.forEach((output) => cell.outputs.add(output));
}

export default {
  initialize({ model }) {
    const notebook = model.widget_manager?.context?.model; // of JupyterLab and Notebook 7
    if (!notebook?.cells) return;
    const page = crypto.randomUUID?.() ?? String(Math.random());
    model.on("msg:custom", (record) => write(notebook, record.place, record.outputs, record.page === page && record.cell));
    model.send({ kind: "loaded", page });
  },
};
