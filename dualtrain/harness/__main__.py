"""``python -m dualtrain.harness``: the harness's own command, which knows our model type."""

from dualtrain.harness.model import main

main()
