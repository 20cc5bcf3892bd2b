/* Every driver, in the order of their steps. */
#include "driver.h"

extern struct driver rng_driver, blk_driver, echo_driver, net_driver, vsock_driver, plug_driver, hostile_driver;
extern struct driver balloon_driver, pvpanic_driver, pmem_driver, watchdog_driver;

struct driver *const drivers[] = {
    &rng_driver, &blk_driver, &echo_driver, &net_driver, &vsock_driver, &plug_driver, &hostile_driver,
    &balloon_driver, &pvpanic_driver, &pmem_driver, &watchdog_driver, NULL,
};
