"""Everything that speaks Flower, together with the two apps; nothing below imports flwr."""
