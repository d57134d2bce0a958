"""Images are read and drawn as files, arrays and contact sheets, and measured by their pixels."""
