/** A problem that the page shows in one sentence: `problems.<name>` in words.json. */
export class Problem extends Error {
  constructor(name, values = {}) {
    super(`${name} ${JSON.stringify(values)}`);
    this.problem = name;
    this.values = values;
  }
}
