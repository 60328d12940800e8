"""Files of records: JSON, lines of it, tables, and what is compressed; opened when data is prepared, and only then."""
