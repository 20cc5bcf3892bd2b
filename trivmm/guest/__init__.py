"""The bundled probe guest."""
