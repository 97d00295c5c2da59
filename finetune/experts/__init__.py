"""Which experts serve which data: counted, drawn, scored, chosen for ESFT."""
