"""What several programs share: flags, records, tables, pictures, texts, methods."""
