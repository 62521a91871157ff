"""The hosts: PEFT, TRL and Axolotl. Each knows the core and its host; only PEFT's is known to the others."""
