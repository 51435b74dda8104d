"""One page that shows a result: tables and charts in one file, without a network."""
