"""The demo of ndlora-plugins: `ndlora demo`, and the two ends of `make demo-axolotl`."""
