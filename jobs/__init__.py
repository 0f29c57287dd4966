"""One file per verb, thin: flags → `RunConfig` → `pipeline`."""
