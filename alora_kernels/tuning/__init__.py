"""`alora tune`: which plans are right on this chip, and which plans and tiles are fastest."""
