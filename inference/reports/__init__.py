"""The page, the pictures and the plots of a fit."""
