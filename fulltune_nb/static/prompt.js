// The field for prompts. Enter sends the text; Shift+Enter begins a new line, and what is pasted keeps its lines.
// fulltune_nb/panels/prompt.py says what is exchanged.

function render({ model, el }) {
  const label = document.createElement("label"), name = document.createElement("span"), field = document.createElement("textarea");
  el.classList.add("fulltune-prompt");
  el.dataset.lmSuppressShortcuts = "true"; // in JupyterLab, Shift+Enter would run the cell
  name.textContent = model.get("description");
  field.placeholder = model.get("placeholder");
  field.title = model.get("tooltip");
  field.rows = 2;
  label.append(name, field);
  el.append(label);

  const store = () => {
    model.set("value", field.value);
    model.save_changes();
  };
  const show = () => {
    if (field.value !== model.get("value")) field.value = model.get("value");
  };
  const taken = (message) => {
    if (message.taken !== field.value) return; // something else was typed meanwhile
    field.value = "";
    store();
  };
  field.addEventListener("change", store); // not letter by letter: when the cursor leaves, as for the Send button
  field.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    model.send({ submitted: field.value });
  });
  model.on("change:value", show);
  model.on("msg:custom", taken);
  show();
  return () => {
    model.off("change:value", show);
    model.off("msg:custom", taken);
  };
}

export default { render };
