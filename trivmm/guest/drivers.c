/* Every driver, in the order of their steps. */
#include "driver.h"

extern struct driver rng_driver;
extern struct driver blk_driver;
extern struct driver echo_driver;
extern struct driver net_driver;
extern struct driver vsock_driver;
extern struct driver balloon_driver;
extern struct driver pmem_driver;
extern struct driver pvpanic_driver;
extern struct driver watchdog_driver;
extern struct driver plug_driver;
extern struct driver hostile_driver;
extern struct driver load_driver;

struct driver *const drivers[] = {
    &rng_driver,
    &blk_driver,
    &echo_driver,
    &net_driver,
    &vsock_driver,
    &balloon_driver,
    &pmem_driver,
    &pvpanic_driver,
    &watchdog_driver,
    &plug_driver,
    &hostile_driver,
    &load_driver,
    NULL,
};
