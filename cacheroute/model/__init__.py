"""Model files: header, experts, catalogue, download, the demo model. Loads no weights and knows no routing."""
