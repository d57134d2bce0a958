"""Images as files, arrays and contact sheets, and what is measured of their pixels."""
